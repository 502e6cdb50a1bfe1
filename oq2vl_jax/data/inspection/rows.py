"""The page of packed rows, with pictures in place: labelled text (trained on) is black, other text grey."""

import html
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from oq2vl_jax.data.packing.local_copy import local_folder
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import is_remote

STYLE = """<style>
 .row { border: 1px solid #d9dfe7; border-radius: 6px; padding: 14px 18px; margin: 18px 0; }
 .document { border-left: 3px solid #2f6fb5; padding: 2px 0 2px 14px; margin: 12px 0; white-space: pre-wrap;
 overflow-wrap: anywhere; } .document figure { display: inline-block; vertical-align: middle; margin: 4px 8px 4px 0; }
 .document img { max-height: 130px; max-width: 240px; border-radius: 4px; display: block; }
 .unlabelled { color: #98a2b0; }
 .key { color: #5a6779; font-size: .8rem; white-space: normal; }
</style>"""


def inspect_rows(names: tuple[str, ...], out: str, num_rows: int = 8, seed: int = 0) -> str:
    """Writes the page and returns a line about the rows. Raises UserError for files that are not packed rows."""
    from oq2vl_jax import paths
    from oq2vl_jax.data.text.codec import TextCodec
    from oq2vl_jax.html import page
    from oq2vl_jax.jobs import read_settings

    files = find_files(names)
    folder = files[0].parent
    settings = read_settings(str(folder))
    for name in ("num_tokens", "visual_tokens"):
        if not isinstance(settings.get(name), int) or settings[name] < 1:
            raise UserError(
                f"{folder / 'settings.json'}: {name} is {settings.get(name)!r}; it is not of a packed folder."
            )
    codec = TextCodec.load(str(folder / "tokenizer"))
    source = open_rows(files)
    if not len(source):
        raise UserError(f"{files[0]}: holds no rows.")
    chosen = sorted(random.Random(seed).sample(range(len(source)), min(num_rows, len(source))))
    line, body = statistics(source, settings, files)
    body += [row_html(i, read_row(source, i, files), codec, settings["visual_tokens"]) for i in chosen]
    lead = f"{line} Shown: {len(chosen)} at random, seed {seed}."
    paths.write_text(out, page(f"Packed rows of {folder.name}", lead, [STYLE, *body]))
    return line


def local(name: str) -> Path:
    """Returns a folder or file of packed rows, or its local copy."""
    if is_remote(name) and name.endswith(".array_record"):
        folder, _, file = name.rpartition("/")
        return local_folder(folder) / file
    return local_folder(name)


def find_files(names: tuple[str, ...]) -> list[Path]:
    files = [
        file
        for found in map(local, names)
        for file in (sorted(found.glob("*.array_record")) if found.is_dir() else [found])
    ]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(
            f"{missing[0] if missing else ' '.join(names)}: no packed rows here; expected rows-NNNNN.array_record."
        )
    if not (files[0].parent / "settings.json").is_file():
        raise UserError(
            f"{files[0].parent}: no settings.json beside the rows; python -m oq2vl_jax.data.pack writes it."
        )
    return files


def open_rows(files: list[Path]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([str(file) for file in files])
    except Exception as error:  # for a broken file the reader raises its C++ library's error
        raise UserError(f"{files[0]}: cannot be read as ArrayRecord ({error}); pack it again.") from error


def read_row(source, index: int, files: list[Path]):
    from oq2vl_jax.data.packing.rows import decode_row

    try:
        row = decode_row(source[index])
        if not row.lengths or sum(row.lengths) != len(row.tokens) or len(row.keys) != len(row.lengths):
            raise ValueError("its documents do not add up")
        return row
    except Exception as error:  # as in open_rows, or bytes of another format
        raise UserError(f"{files[0].parent}: row {index} cannot be read ({error}); pack the shards again.") from error


def statistics(source, settings: dict, files: list[Path]) -> tuple[str, list[str]]:
    """Returns a summary line and charts over every row."""
    from oq2vl_jax.data.packing.packer import LENGTH_BIN, histogram
    from oq2vl_jax.data.packing.report import numbers
    from oq2vl_jax.html import bars

    rows = (read_row(source, i, files) for i in range(len(source)))
    counts = [(len(row.tokens), int(row.is_labelled.sum()), len(row.images), row.lengths) for row in rows]
    tokens, labelled, images = (sum(int(row[i]) for row in counts) for i in range(3))  # pyright: ignore[reportArgumentType]
    documents = sum(len(row[3]) for row in counts)
    fill = tokens / (len(source) * settings["num_tokens"])
    line = (
        f"{len(source):,} rows of {settings['num_tokens']:,} tokens, fill {fill:.3f}: {documents:,} documents, "
        f"{images:,} images, {labelled / tokens:.1%} of the tokens labelled."
    )
    lengths = (length // LENGTH_BIN * LENGTH_BIN for *_, lengths in counts for length in lengths)
    charts = [
        bars("images per row", numbers(histogram(row[2] for row in counts))),
        bars("documents per row", numbers(histogram(len(row[3]) for row in counts))),
        bars("tokens per document", numbers(histogram(lengths))),
    ]
    return line, [f'<div class="charts">{"".join(charts)}</div>']


def row_html(index: int, row, codec, visual_tokens: int) -> str:
    num_places = int((row.tokens == codec.special.image).sum())
    if num_places != len(row.images) * visual_tokens:
        raise UserError(
            f"row {index}: {len(row.images)} images for {num_places} visual tokens, {visual_tokens} an image."
        )
    documents, start, images = [], 0, iter(row.images)
    for number, length in enumerate(row.lengths):
        tokens, is_labelled = row.tokens[start : start + length], row.is_labelled[start : start + length]
        start += length
        key = f'<div class="key">document {number + 1}: {html.escape(row.keys[number])}, {length} tokens</div>'
        pieces = "".join(document_pieces(tokens, is_labelled, images, codec, visual_tokens))
        documents.append(f'<div class="document">{key}{pieces}</div>')
    return f'<div class="row"><b>row {index}</b>, {len(row.tokens):,} tokens{"".join(documents)}</div>'


def document_pieces(
    tokens: np.ndarray, is_labelled: np.ndarray, images: Iterator[bytes], codec, visual_tokens: int
) -> Iterator[str]:
    """Yields HTML: runs of text with the same label, and a picture in place of its visual tokens."""
    from oq2vl_jax.data.samples.thumbnail import picture

    is_image = tokens == codec.special.image
    changes = np.flatnonzero((is_image[1:] != is_image[:-1]) | (is_labelled[1:] != is_labelled[:-1])) + 1
    for run in np.split(np.arange(len(tokens)), changes):
        if is_image[run[0]]:
            for _ in range(len(run) // visual_tokens):
                yield picture(next(images), f"{visual_tokens} visual tokens")
        else:
            text = html.escape(codec.decode_exact(tokens[run].tolist()))
            yield text if is_labelled[run[0]] else f'<span class="unlabelled">{text}</span>'
