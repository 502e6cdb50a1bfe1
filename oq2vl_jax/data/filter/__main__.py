"""python -m oq2vl_jax.data.filter RULES.toml: metadata and scores to a set of sample ids and a report.

RULES.toml:    expression = "clip_l14_top(0.3) & basic | mlm(semantic_understanding >= 85) | uids(dfn.npy)"
               seed = 0                  # for ties of exact top fractions
               [basic]                   # optional; DataComp's values are the defaults
               min_short_side = 200

OUT/uids.npy (DataComp's sorted u8,u8), OUT/report.json and OUT/report.html; rules are listed in filter/rules.py.
"""

import json
from dataclasses import dataclass

import tyro

from oq2vl_jax.bounds import CountOrZero, parse
from oq2vl_jax.data.paths import check_has_polars
from oq2vl_jax.errors import run_command


@dataclass(frozen=True)
class FilterCommand:
    """Metadata and score parquets to the ids of the samples that an expression keeps."""

    rules: tyro.conf.Positional[str]
    """TOML file with `expression`."""
    metadata: str
    """Parquet files in the columns of DataComp or img2dataset: uid or key, text, original_width, original_height."""
    out: str
    """Folder for uids.npy, report.json and report.html."""
    scores: tuple[str, ...] = ()
    """Parquet files with uid and scores, as oq2vl_jax.data.score writes them."""
    shards: str | None = None
    """Tars to take pictures of kept and rejected samples from, for the report."""
    num_pictures: CountOrZero = 24
    """Of each, kept and rejected."""


def run_filter(command: FilterCommand) -> dict:
    """Writes the files of --out; returns the report."""
    check_has_polars("oq2vl_jax.data.filter")
    from oq2vl_jax.data import paths
    from oq2vl_jax.data.filter.apply import apply_rules, load_filter
    from oq2vl_jax.data.filter.pool import read_pool
    from oq2vl_jax.data.filter.report import choose_pictures, make_report, write_page

    paths.check_out(command.out)
    selection = load_filter(command.rules)
    metadata = paths.expand_paths("--metadata", command.metadata)
    scores = [file for pattern in command.scores for file in paths.expand_paths("--scores", pattern)]
    shards = paths.expand_paths("--shards", command.shards) if command.shards else []
    pool = read_pool(metadata, scores, selection.rules)
    result = apply_rules(selection, pool)
    report = make_report(selection, pool, result) | {"metadata_files": len(metadata), "score_files": len(scores)}
    pictures = choose_pictures(shards, pool, selection, result, command.num_pictures)
    paths.make_folder(command.out)
    write_page(paths.join(command.out, "report.html"), report, pictures)
    paths.write_text(paths.join(command.out, "report.json"), json.dumps(report, indent=2) + "\n")
    result.uids.save(paths.join(command.out, "uids.npy"))  # last: it says that everything is whole
    return report


def main() -> None:
    command = parse(FilterCommand, prog="python -m oq2vl_jax.data.filter")
    report = run_filter(command)
    print(
        f"{report['kept']:,} of {report['samples']:,} samples kept ({report['kept'] / max(report['samples'], 1):.1%}), "
        f"{report['uids']:,} ids in {command.out}/uids.npy; samples without a valid id: {report['invalid_uids']:,}; "
        f"report: {command.out}/report.html"
    )


if __name__ == "__main__":
    run_command(main)
