"""Digests files at memory speed (XXH3), to tell a damaged, swapped or badly copied file from the one written."""

from pathlib import Path

READ_BYTES = 2**22
SAMPLE_BYTES = 2**16
"""Bytes read at each end of a file: enough to tell two files apart, not to find a flipped bit."""


def digest_of(file: Path) -> tuple[int, str]:
    """Returns (bytes, digest) of a file, read in pieces."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def sample_of_file(file: Path) -> tuple[int, str]:
    """Returns (bytes of the file, digest of its two ends)."""
    import xxhash

    size = file.stat().st_size
    with file.open("rb") as stream:
        ends = stream.read(SAMPLE_BYTES)
        stream.seek(max(0, size - SAMPLE_BYTES))
        ends += stream.read(SAMPLE_BYTES)
    return size, xxhash.xxh3_128(ends).hexdigest()


def digest_of_text(text: str) -> str:
    import xxhash

    return xxhash.xxh3_128(text.encode()).hexdigest()
