"""python -m oq2vl_jax.curate.score: scores the captions of tars and writes one parquet file per tar.

    key, uid, one column per score (null if there is none), status ("scored", or the reason why not)

--model clip: clip_score, the cosine similarity of a CLIP that convert.from_clip converted. --model mlm-filter: up to
four integers 0-100 that a model of this project's own architecture writes. jobs.py describes how tasks are run,
resumed and spread over machines. One process uses all devices it sees, so give each rank its own devices.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oq2vl_jax import paths
from oq2vl_jax.bounds import SmallCount, parse
from oq2vl_jax.curate.mlm_metrics import METRICS, Metric
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.jobs import Execution, Job, make_tasks, run_job, write_manifest


@dataclass(frozen=True)
class ScoreConfig:
    """Scores the captions of WebDataset tars and writes parquet files."""

    shards: str
    """Tars: 'DIR/{00000..00009}.tar', a glob, or one path."""
    out: str
    """Folder for the parquet files and manifest.json."""
    model: Literal["clip", "mlm-filter"]
    checkpoint: str
    """clip: a checkpoint from convert.from_clip. mlm-filter: any checkpoint of this project, for example from
    convert.from_prismatic."""
    batch_size: SmallCount = 64
    metrics: tuple[Metric, ...] = METRICS
    """Metrics that mlm-filter scores."""
    criteria: str | None = None
    """JSON file {metric: text with {caption}} with the texts that the mlm-filter model was trained with. Default: our
    own wording (criteria.json)."""
    profile: Literal["own", "mlm_filter"] = "own"
    """Prompt and parser of mlm-filter. own: this project's; mlm_filter: the published scorer's, needs --criteria."""
    broken_shards: Literal["stop", "keep"] = "stop"
    """For a tar that is cut off: stop with an error, or keep its complete samples and count the tar."""
    execution: Execution = Execution(num_workers=1)


def score_shards(config: ScoreConfig) -> dict | None:
    """Scores every shard and returns the manifest, or None while other ranks have tasks left. Raises UserError."""
    from oq2vl_jax import paths

    paths.check_has_polars("oq2vl_jax.curate.score")
    files = paths.expand_paths("--shards", config.shards)
    if config.profile == "mlm_filter" and (config.model != "mlm-filter" or config.criteria is None):
        raise UserError(
            "--profile mlm_filter asks as the published scorer does: it needs --model mlm-filter and --criteria, "
            "the texts that its weights were trained with."
        )
    settings: dict[str, Any] = {"model": config.model, "checkpoint": checkpoint_identity(config.checkpoint)}
    settings["batch_size"] = config.batch_size  # the last bits of a score can depend on the batch size
    if config.model == "mlm-filter":
        settings |= {"metrics": list(config.metrics), "criteria": criteria_identity(config)}
        if config.profile != "own":  # settings of earlier versions have no profile and mean "own"
            settings["profile"] = config.profile
    job = Job(
        out=config.out,
        name="",
        suffix=".parquet",
        settings=settings,
        work=functools.partial(score_files, config),
        progress="{scored} of {samples} samples scored",
        broken_shards=config.broken_shards,
    )
    reports = run_job(job, make_tasks(files), config.execution)
    if reports is None:
        return None
    manifest: dict = {name: sum(report[name] for report in reports) for name in ("samples", "scored")}
    for name in ("skipped", "unparsed"):
        manifest[name] = dict(sorted(sum((Counter(report[name]) for report in reports), Counter()).items()))
    manifest |= settings | {"files": [{"file": r["file"], "inputs": r["inputs"]} for r in reports]}
    write_manifest(job, manifest)
    return manifest


def checkpoint_identity(path: str) -> str:
    """Returns a text that changes with the weights: its absolute path and the newest time of a _CHECKPOINT_METADATA."""
    import os

    if paths.is_remote(path):
        from oq2vl_jax.checkpoint_digests import METADATA
        from oq2vl_jax.remote_checkpoints import find_remote

        url = find_remote(path)
        return f"{url} {paths.file_version(paths.join(url, METADATA))}"
    file = Path(path)
    if not file.is_dir():
        raise UserError(f"--checkpoint {path}: no such folder.")
    newest = max((entry.stat().st_mtime_ns for entry in file.rglob("_CHECKPOINT_METADATA")), default=0)
    return f"{os.path.abspath(path)} {newest}"


def criteria_identity(config: ScoreConfig) -> str:
    import hashlib

    from oq2vl_jax.curate.mlm_filter import DEFAULT_CRITERIA, read_criteria

    texts = read_criteria(config.criteria or str(DEFAULT_CRITERIA), config.metrics)
    return hashlib.sha256(repr(texts).encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def load_scorer(config: ScoreConfig):
    """Loads the scorer once per process."""
    if config.model == "clip":
        from oq2vl_jax.curate.clip_scorer import ClipScorer

        return ClipScorer(config.checkpoint, config.batch_size)
    from oq2vl_jax.curate.mlm_filter import MLMFilterScorer

    return MLMFilterScorer(config.checkpoint, config.batch_size, config.criteria, config.metrics, config.profile)


def score_files(config: ScoreConfig, files: tuple[str, ...], target: Path) -> dict:
    """Writes the parquet of one tar; returns the report."""
    import polars as pl

    from oq2vl_jax.data.samples.formats import read_whole_samples
    from oq2vl_jax.data.samples.images import ImageError
    from oq2vl_jax.data.samples.tars import CutOffError
    from oq2vl_jax.data.text.codec import SampleError

    scorer = load_scorer(config)
    rows: list[dict] = []
    waiting: list[tuple[dict, Any]] = []
    skipped = Counter()

    def score_waiting() -> None:
        for (row, _), scores in zip(waiting, scorer.score([prepared for _, prepared in waiting]), strict=True):
            row |= scores
        waiting.clear()

    try:
        for sample in read_whole_samples(files[0]):
            row = {"key": sample.key, "uid": sample.uid, "status": sample.problem or "scored"}
            rows.append(row)
            if not sample.problem and sample.text is None:
                row["status"] = "no_caption"
            if row["status"] == "scored":
                try:
                    waiting.append((row, scorer.prepare(sample)))
                except (ImageError, SampleError) as problem:
                    row["status"] = problem.reason
            if row["status"] != "scored":
                skipped[row["status"]] += 1
            if len(waiting) == config.batch_size:
                score_waiting()
    except CutOffError:
        if config.broken_shards == "stop":
            raise
        skipped["shard_cut_off"] += 1
    if waiting:
        score_waiting()
    kind = pl.Float32 if config.model == "clip" else pl.Int16
    schema = {"key": pl.String, "uid": pl.String} | dict.fromkeys(scorer.columns, kind) | {"status": pl.String}
    pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema).write_parquet(target)
    scored = [row for row in rows if row["status"] == "scored"]
    unparsed = {name: sum(row[name] is None for row in scored) for name in scorer.columns}
    return {"samples": len(rows), "scored": len(scored), "skipped": dict(skipped), "unparsed": unparsed}


def main() -> None:
    import tyro

    from oq2vl_jax.jobs import counted

    config = parse(ScoreConfig, prog="python -m oq2vl_jax.curate.score", config=(tyro.conf.OmitArgPrefixes,))
    manifest = score_shards(config)
    if manifest is not None:
        print(
            f"{manifest['scored']} of {manifest['samples']} samples scored; skipped: {counted(manifest['skipped'])}; "
            f"replies that are no score: {counted(manifest['unparsed'])}. Manifest: {config.out}/manifest.json"
        )


if __name__ == "__main__":
    run_command(main)
