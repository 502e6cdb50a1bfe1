"""Runs a filter: reads metadata and scores, writes uids.npy, report.json and report.html."""

import json
from dataclasses import dataclass

import tyro

from oq2vl_jax.bounds import CountOrZero, check_bounds
from oq2vl_jax.paths import check_has_polars, expand_paths


@dataclass(frozen=True)
class FilterCommand:
    """Reads metadata and scores from parquet files and writes the ids of the samples that an expression keeps."""

    rules: tyro.conf.Positional[str]
    """TOML file with `expression`."""
    metadata: str
    """Parquet files with the columns of DataComp or img2dataset: uid or key, text, original_width, original_height."""
    out: str
    """Folder for uids.npy, report.json and report.html."""
    scores: tuple[str, ...] = ()
    """Parquet files with uid and scores, as oq2vl_jax.curate.score writes them."""
    shards: str | None = None
    """Tars from which the report shows pictures of kept and rejected samples."""
    num_pictures: CountOrZero = 24
    """Pictures of each kind, kept and rejected."""


def run_filter(command: FilterCommand) -> dict:
    """Writes the files of --out; returns the report."""
    check_has_polars("oq2vl_jax.curate.filter")
    from oq2vl_jax import paths
    from oq2vl_jax.curate.filter.apply import apply_rules, load_filter
    from oq2vl_jax.curate.filter.pool import read_pool
    from oq2vl_jax.curate.filter.report import choose_pictures, make_report, write_page

    paths.check_out(command.out)
    check_bounds(command, as_flags=True)
    selection = load_filter(command.rules)
    metadata, scores = input_files(command)
    shards = expand_paths("--shards", command.shards) if command.shards else []
    pool = read_pool(metadata, scores, selection.rules)
    result = apply_rules(selection, pool)
    report = make_report(selection, pool, result) | {"metadata_files": len(metadata), "score_files": len(scores)}
    pictures = choose_pictures(shards, pool, selection, result, command.num_pictures)
    paths.make_folder(command.out)
    write_page(paths.join(command.out, "report.html"), report, pictures)
    paths.write_text(paths.join(command.out, "report.json"), json.dumps(report, indent=2) + "\n")
    result.uids.save(paths.join(command.out, "uids.npy"))  # last: its presence means that all files are complete
    return report


def input_files(command: FilterCommand) -> tuple[list[str], list[str]]:
    """Returns the (metadata, score) files that the patterns match."""
    scores = [file for pattern in command.scores for file in expand_paths("--scores", pattern)]
    return expand_paths("--metadata", command.metadata), scores
