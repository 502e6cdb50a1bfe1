"""The page of samples that are not packed yet: figures, histograms, reasons, and samples as the model will see them."""

import html
import io
from collections import Counter

import numpy as np

from oq2vl_jax import paths
from oq2vl_jax.data.inspection.options import InspectCommand
from oq2vl_jax.data.inspection.rows import STYLE, document_pieces
from oq2vl_jax.data.inspection.survey import Survey, Total, survey
from oq2vl_jax.data.packing.documents import Limits
from oq2vl_jax.data.samples.formats import format_of
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.data.text.document import Document
from oq2vl_jax.errors import UserError
from oq2vl_jax.html import bars, page, table

NUM_BINS, NUM_LANGUAGES = 40, 15
SHARES = (5, 50, 95)


def inspect_samples(command: InspectCommand) -> str:
    """Writes the page of some data sets and returns its first line. Raises UserError."""
    if command.tokenizer is None:
        raise UserError(f"{command.rows[0]}: samples that are not packed yet need --tokenizer.")
    files = [file for name in command.rows for file in paths.expand_paths("SAMPLES", name)]
    if command.columns and not all(format_of(file).takes_columns for file in files):
        raise UserError("--columns does not apply to every file; parquet files have columns.")
    limits = Limits(
        command.template, command.num_tokens, command.max_images, command.visual_tokens, command.unmarked_images,
        command.long_documents,
    )  # fmt: skip
    codec = TextCodec.load(command.tokenizer)
    found, total = survey(
        files, command.tokenizer, limits, Reading(command.images, command.columns),
        None if command.all else command.num_samples, command.shown, command.seed, command.num_workers,
    )  # fmt: skip
    if not found.samples:
        raise UserError(f"{' '.join(command.rows)}: hold no samples.")
    line = summary(found, total, limits)
    body = [STYLE, table(["", ""], figures(found, total, limits)), *charts(found), *tables(found)]
    body.append(f"<h2>{len(found.shown)} samples as the model will see them</h2>")
    body += [sample_html(document, codec, command) for document in found.shown]
    lead = f"{line} Black text is trained on, grey text is not. Seed {command.seed}."
    paths.write_text(command.out, page(f"Samples of {', '.join(command.rows)}", lead, body))
    return line


def summary(found: Survey, total: Total, limits: Limits) -> str:
    """Returns the line that the command prints."""
    skipped = sum(found.skipped.values()) / found.samples
    return (
        f"{total.how}{total.samples:,} samples in all, {found.samples:,} read: "
        f"{mean_pictures(found):.2f} pictures and {median(found.tokens):,.0f} tokens a sample (mean, median), "
        f"{skipped:.1%} would be skipped, {duplicate_share(found):.1%} of the pictures occurred before."
        + (f" Packed: at least {num_rows(found, total, limits):,} rows of {limits.num_tokens:,} tokens." if found.tokens
           else "")
    )  # fmt: skip


def mean_pictures(found: Survey) -> float:
    return sum(number * samples for number, samples in found.pictures.items()) / found.samples


def median(values: list[int]) -> float:
    return float(np.median(values)) if values else 0.0


def duplicate_share(found: Survey) -> float:
    """Returns the share of the pictures read that are, byte for byte, one that was read before."""
    number = sum(found.hashes.values())
    return (number - len(found.hashes)) / number if number else 0.0


def num_rows(found: Survey, total: Total, limits: Limits) -> int:
    """Returns the rows that the samples need at least: by their tokens, or by their pictures."""
    kept = (found.samples - sum(found.skipped.values())) / found.samples * total.samples
    tokens = np.minimum(found.tokens, limits.num_tokens).mean()
    return int(np.ceil(kept * max(tokens / limits.num_tokens, mean_pictures(found) / limits.max_images)))


def figures(found: Survey, total: Total, limits: Limits) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (f"samples in all{', ' if total.how else ''}{total.how}".rstrip(), total.samples),
        ("samples read", found.samples),
        ("would be skipped", f"{sum(found.skipped.values()) / found.samples:.2%}"),
        ("pictures a sample, mean", mean_pictures(found)),
        ("pictures that occurred before", f"{duplicate_share(found):.2%} of {sum(found.hashes.values()):,}"),
    ]
    if found.tokens:
        parts = ", ".join(f"{value:,.0f}" for value in np.percentile(found.tokens, SHARES))
        rows.append((f"tokens a sample, {' / '.join(map(str, SHARES))} % quantiles", parts))
        rows.append((f"rows of {limits.num_tokens:,} tokens and {limits.max_images} images, at least",
                     num_rows(found, total, limits)))  # fmt: skip
    if found.sizes:
        sides = np.array(found.sizes)
        for name, values in (("width", sides[:, 0]), ("height", sides[:, 1])):
            parts = ", ".join(f"{value:,.0f}" for value in np.percentile(values, SHARES))
            rows.append((f"{name} in pixels, {' / '.join(map(str, SHARES))} % quantiles", parts))
    return rows


def charts(found: Survey) -> list[str]:
    sides = np.array(found.sizes).reshape(-1, 2)
    drawn = [
        bars("tokens per sample", binned(found.tokens)),
        bars("pictures per sample", {float(number): samples for number, samples in sorted(found.pictures.items())}),
        bars("width in pixels", binned(sides[:, 0])),
        bars("height in pixels", binned(sides[:, 1])),
        bars("width / height", binned(sides[:, 0] / np.maximum(sides[:, 1], 1), 0.1)),
    ]
    return [f'<h2>Distributions</h2><div class="charts">{"".join(drawn)}</div>']


def binned(values, width: float | None = None) -> dict[float, int]:
    """Returns the lower edge of each bin -> values in it; what lies beyond the 99.5 % quantile is in the last bin."""
    values = np.asarray(values, float)
    if not len(values):
        return {}
    high = float(np.percentile(values, 99.5))
    if width is None:
        width = float(max(1, np.ceil(high / NUM_BINS)))
    edges = np.minimum(np.floor(values / width), np.floor(high / width))
    return {float(edge) * width: count for edge, count in sorted(Counter(edges.tolist()).items())}


def tables(found: Survey) -> list[str]:
    reasons = [(reason, count, f"{count / found.samples:.2%}", ", ".join(found.keys[reason]))
               for reason, count in found.skipped.most_common()]  # fmt: skip
    body = ["<h2>Would be skipped</h2>", table(["reason", "samples", "share", "for example"], reasons)]
    body += ["<h2>Noted, and kept</h2>", table(["what", "times"], found.notes.most_common())]
    named = sum(found.languages.values())
    languages = [(name, count, f"{count / named:.1%}") for name, count in found.languages.most_common(NUM_LANGUAGES)]
    body += ["<h2>Languages</h2>", table(["language", "samples", "share"], languages)]
    if not named:
        body.append("<p>Languages need the extra filter, and texts.</p>")
    return body


def sample_html(document: Document, codec: TextCodec, command: InspectCommand) -> str:
    images = iter([as_seen(image, command.image_size) for image in document.images])
    pieces = "".join(document_pieces(document.tokens, document.is_labelled, images, codec, command.visual_tokens))
    head = (
        f"{html.escape(document.key)}: {len(document.tokens):,} tokens, {int(document.is_labelled.sum()):,} trained on"
    )
    return f'<div class="row"><div class="key">{head}</div><div class="document">{pieces}</div></div>'


def as_seen(image: bytes, size: int) -> bytes:
    """Returns the picture as the encoder gets it: resized to a square."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(decode_image(image, size)).save(buffer, "PNG")
    return buffer.getvalue()
