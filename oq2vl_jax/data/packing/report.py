"""Writes the page of a packed folder: fill, images and documents per row, lengths, skipped samples and notes."""

from oq2vl_jax import paths
from oq2vl_jax.html import bars, page, table


def write_report(path: str, manifest: dict) -> None:
    rows, skipped = manifest["rows"], sum(manifest["skipped"].values())
    lead = (
        f"{manifest['samples']:,} samples: {manifest['documents']:,} documents in {rows:,} rows of "
        f"{manifest['num_tokens']:,} tokens and at most {manifest['max_images']} images; {skipped:,} left out."
    )
    figures = [
        ("token fill", manifest["token_fill"]),
        ("image slots used", manifest["image_fill"]),
        ("documents per row", manifest["documents"] / rows),
        ("images per row", manifest["images"] / rows),
        ("tokens per document", manifest["tokens"] / manifest["documents"]),
    ]
    charts = [
        bars("images per row", numbers(manifest["images_per_row"])),
        bars("documents per row", numbers(manifest["documents_per_row"])),
        bars("tokens per document", numbers(manifest["document_tokens"])),
    ]
    body = [table(["", ""], figures), f'<h2>Rows</h2><div class="charts">{"".join(charts)}</div>']
    body += ["<h2>Left out</h2>", table(["reason", "samples"], manifest["skipped"].items())]
    body += ["<h2>Noted, and kept</h2>", table(["what", "times"], manifest["notes"].items())]
    files = [(entry["file"], entry["rows"], ", ".join(entry["inputs"])) for entry in manifest["files"][:200]]
    body += [f"<h2>Files ({len(manifest['files']):,})</h2>", table(["file", "rows", "made from"], files)]
    paths.write_text(path, page("Packed rows", lead, body))


def numbers(counts: dict[str, int]) -> dict[float, int]:
    return {float(value): count for value, count in counts.items()}
