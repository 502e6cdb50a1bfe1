"""python -m oq2vl_jax.curate.reshard: copies the samples of a uid set from tars to new tars.

One task reads `--tars-per-task` tars and writes one, NNNNNNNN.tar. The order of the samples and the bytes of their
files are kept. A sample whose id is in the set n times is written n times (KEY, KEY-1, ...); a key that occurs again
in the tars of one task gets a number too. jobs.py describes how tasks are run, resumed and spread over machines.
"""

import functools
import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oq2vl_jax.bounds import Count, parse
from oq2vl_jax.errors import run_command
from oq2vl_jax.jobs import Execution, Job, make_tasks, run_job, write_manifest

TOTALS = ("samples", "kept", "written")


@dataclass(frozen=True)
class ReshardConfig:
    """Copies the samples in a uid set from WebDataset tars to new tars."""

    shards: str
    """Tars: 'DIR/{00000000..00000009}.tar', a glob, or one path. KEY.json holds "uid"; without it, a numeric KEY (as of
    img2dataset) gives the id."""
    uids: str
    """Uid set, a sorted .npy of dtype u8,u8, as oq2vl_jax.curate.filter writes it."""
    out: str
    """Folder for the new tars and manifest.json."""
    tars_per_task: Count = 1
    """Input tars per output tar. About 1 / (share of samples kept) gives output tars of the same size."""
    broken_shards: Literal["stop", "keep"] = "stop"
    """For a tar that is cut off: stop with an error, or keep its complete samples and count the tar."""
    execution: Execution = Execution()


def reshard(config: ReshardConfig) -> dict | None:
    """Writes the tars and returns the manifest, or None while other ranks have tasks left. Raises UserError."""
    from oq2vl_jax import paths

    files = paths.expand_paths("--shards", config.shards)
    uids = load_uids(config.uids)
    settings = {
        "tars_per_task": config.tars_per_task,
        "uids": len(uids),
        "different_uids": len(uids.unique()),
        "uids_sha256": uids.sha256(),
    }
    job = Job(
        out=config.out,
        name="",
        suffix=".tar",
        settings=settings,
        work=functools.partial(reshard_files, config),
        progress="{written} of {samples} samples",
        broken_shards=config.broken_shards,
    )
    reports = run_job(job, make_tasks(files, config.tars_per_task), config.execution)
    if reports is None:
        return None
    manifest = {
        **{name: sum(report[name] for report in reports) for name in TOTALS},
        "skipped": dict(sorted(sum((Counter(report["skipped"]) for report in reports), Counter()).items())),
        **settings,
        "files": [{"file": r["file"], "samples": r["written"], "inputs": r["inputs"]} for r in reports],
    }
    write_manifest(job, manifest)
    return manifest


@functools.lru_cache(maxsize=1)
def load_uids(path: str):
    """Loads the set once per worker process."""
    from oq2vl_jax.data.samples.uids import UidSet

    return UidSet.load(path)


def reshard_files(config: ReshardConfig, files: tuple[str, ...], target: Path) -> dict:
    """Writes the wanted samples of some tars to `target`; returns the report."""
    from oq2vl_jax.data.samples.tars import CutOffError, read_members

    uids = load_uids(config.uids)
    counts, skipped = Counter(), Counter()
    written_keys: set[str] = set()
    with tarfile.open(target, "w") as tar:
        for file in files:
            try:
                for members in read_members(file):
                    counts["samples"] += 1
                    copies, problem = number_of_copies(members, uids)
                    if problem:
                        skipped[problem] += 1
                    counts["kept"] += copies > 0
                    for _ in range(copies):
                        key = unused_key(members.key, written_keys)
                        write_members(tar, key, members.files)
                        counts["written"] += 1
            except CutOffError:
                if config.broken_shards == "stop":
                    raise
                skipped["shard_cut_off"] += 1
    return {**{name: counts[name] for name in TOTALS}, "skipped": dict(skipped)}


def write_members(tar: tarfile.TarFile, key: str, files: dict[str, bytes]) -> None:
    """Writes the files of a key. Headers hold only name and size, so that equal samples give equal bytes."""
    for suffix, data in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def number_of_copies(members, uids) -> tuple[int, str | None]:
    """Returns (number of copies, problem). A sample outside the set has 0 copies and no problem."""
    from oq2vl_jax.data.samples.ids import parse_uid
    from oq2vl_jax.data.samples.shards import uid_of

    if members.problem:
        return 0, members.problem
    uid = parse_uid(uid_of(members))
    return (uids.count(*uid), None) if uid else (0, "uid_missing")


def unused_key(key: str, used: set[str]) -> str:
    """Returns the key itself the first time, then KEY-1, KEY-2, ..., and records it as used."""
    candidate, number = key, 0
    while candidate in used:
        number += 1
        candidate = f"{key}-{number}"
    used.add(candidate)
    return candidate


def main() -> None:
    import tyro

    from oq2vl_jax.jobs import counted

    config = parse(ReshardConfig, prog="python -m oq2vl_jax.curate.reshard", config=(tyro.conf.OmitArgPrefixes,))
    manifest = reshard(config)
    if manifest is not None:
        print(
            f"{manifest['written']} samples written: {manifest['kept']} of {manifest['samples']} are among the "
            f"{manifest['different_uids']} ids of the set; skipped: {counted(manifest['skipped'])}. "
            f"Manifest: {config.out}/manifest.json"
        )


if __name__ == "__main__":
    run_command(main)
