"""A thousand random damages each of tars, pictures and parquets: counted or one sentence, within bounded memory."""

import io
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from oq2vl_jax.curate.filter.apply import apply_rules, load_filter
from oq2vl_jax.curate.filter.pool import read_pool
from oq2vl_jax.data.packing.documents import read_documents
from oq2vl_jax.data.samples.images import ImageError, check_image, decode_image
from oq2vl_jax.data.samples.parquet import in_own_process, reading_parquet
from oq2vl_jax.data.samples.tars import CutOffError
from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.tables import read_parquet
from tests.data.test_odd_files import LIMITS, caption_members, tar_of

NUM_DAMAGES = 1000
MAX_GROWTH_MIB = 512
"""Of this process's peak memory, over all damages of a kind; measured: 0 to 60."""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """With flipped, overwritten, cut, zeroed or doubled bytes in one to three places, half of them near an end."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        near = int(rng.integers(min(len(changed), 300)))
        at = (int(rng.integers(len(changed))), near, len(changed) - 1 - near)[rng.choice(3, p=(0.5, 0.25, 0.25))]
        length, kind = int(rng.choice((1, 8, 512))), rng.integers(5)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at : at + length] = rng.bytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at : at + length] = bytes(length)
        else:
            changed[at:at] = changed[at : at + length]
        changed = changed or bytearray(b"x")
    return bytes(changed)


@pytest.fixture
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(f"peak memory grew by {growth:.0f} MiB")
    assert growth < MAX_GROWTH_MIB


def test_tars(tmp_path, codec, bounded_memory):
    """Samples = documents + counted, or a sentence about the tar."""
    whole = Path(tar_of(tmp_path / "whole.tar", [m for i in range(4) for m in caption_members(i)])).read_bytes()
    rng, outcomes = np.random.default_rng(0), Counter()
    for _ in range(NUM_DAMAGES):
        (tmp_path / "0.tar").write_bytes(damaged(whole, rng))
        try:
            documents, counts = read_documents([str(tmp_path / "0.tar")], codec, LIMITS, "stop")
            assert counts["samples"] == len(documents) + sum(counts["skipped"].values())
            outcomes["counted"] += 1
        except CutOffError as error:
            assert "0.tar: the tar is broken or cut off after" in str(error)  # noqa: PT017
            outcomes["sentence"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 100


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_pictures(bounded_memory):
    """What passes when it is packed decodes when it is trained on, in every way; what does not is counted there."""
    rng, outcomes = np.random.default_rng(0), Counter()
    noise = rng.integers(0, 256, (40, 56, 3), np.uint8)
    image = Image.fromarray(noise).resize((160, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        encoded(image, "JPEG", exif=exif), encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"), encoded(image, "PNG"), encoded(image.convert("RGBA"), "PNG"),
        encoded(image.convert("P"), "PNG"), encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 256), "PNG"),
        encoded(image, "WEBP"), encoded(image, "GIF"), encoded(image, "BMP"), encoded(image, "TIFF"),
        encoded(image, "TIFF", compression="tiff_lzw"),
    ]  # fmt: skip
    for i in range(NUM_DAMAGES):
        data = damaged(pictures[i % len(pictures)], rng)
        try:
            check_image(data)
        except ImageError as problem:
            outcomes[problem.reason] += 1
            for is_exact, as_seen in ((True, False), (False, False), (True, True)):
                with pytest.raises(ImageError):
                    decode_image(data, 32, is_exact, as_seen)
            continue
        outcomes["decodes"] += 1
        for is_exact, as_seen in ((True, False), (False, False), (True, True)):
            assert decode_image(data, 32, is_exact, as_seen).shape == (32, 32, 3)
    print(outcomes)
    assert min(outcomes["decodes"], outcomes["image_undecodable"]) > 100


def read_damaged(place):
    """(outcomes) of the damages from a number on; the number of the one under way stands in a file."""
    folder, first = place
    contents = [file.read_bytes() for file in sorted(folder.glob("whole*"))]
    selection, file, outcomes = load_filter(str(folder / "rules.toml")), folder / "0.parquet", Counter()
    for i in range(first, NUM_DAMAGES):
        file.write_bytes(damaged(contents[i % 3], np.random.default_rng([4, i])))
        (folder / "number").write_text(str(i))
        try:
            pool = read_pool([str(file)], [], selection.rules)
            assert len(apply_rules(selection, pool).kept) == len(pool) == len(read_parquet(file))
            outcomes["read"] += 1
        except UserError as error:
            assert "0.parquet: " in str(error) or "column" in str(error)  # noqa: PT017
            outcomes["sentence"] += 1
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return outcomes, int(peak.split()[1]) / 2**10  # ru_maxrss would be what the parent had when it started this one


def test_parquets(tmp_path):
    """A sentence that names the file, or all rows that its footer counts: pages carry no checksum that Polars reads.

    One damage in a thousand ends the process that reads it, so another one reads them all; the command does so too.
    """
    rng = np.random.default_rng(4)
    for compression in ("snappy", "zstd", "uncompressed"):
        pl.DataFrame({
            "uid": [rng.bytes(16).hex() for _ in range(300)],
            "text": ["a red photograph of a dog"] * 300,
            "original_width": rng.integers(50, 900, 300),
            "original_height": rng.integers(50, 900, 300),
            "clip_l14_similarity_score": rng.normal(0.2, 0.05, 300).astype(np.float32),
        }).write_parquet(tmp_path / f"whole_{compression}.parquet", compression=compression)  # fmt: skip
    (tmp_path / "rules.toml").write_text('expression = "clip_l14_top(0.3) & words(>= 3) & short_side(>= 100)"')
    outcomes, first = Counter(), 0
    while first < NUM_DAMAGES:
        try:
            found, peak = in_own_process(read_damaged, (tmp_path, first), lambda: [str(tmp_path / "0.parquet")])
            assert peak < 2 * MAX_GROWTH_MIB  # of the whole process
            print(f"peak memory {peak:.0f} MiB")
            outcomes += found
            break
        except UserError as error:
            assert "0.parquet: cannot be read as parquet: it ends the process" in str(error)  # noqa: PT017
            first = int((tmp_path / "number").read_text()) + 1
            outcomes["ended the process"] += 1
    print(outcomes)


def test_a_panic_of_polars_is_a_sentence():
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet: assertion failed"):  # noqa: SIM117
        with reading_parquet("a.parquet"):
            raise pl.exceptions.PanicException("assertion failed")
