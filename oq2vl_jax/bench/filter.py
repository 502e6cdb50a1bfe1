"""Measures filtering: uid membership, and a three-rule expression over metadata by the command itself.

Metadata of any size is written piece by piece (40 bytes a row), filtered by `python -m oq2vl_jax.curate.filter` in a
process of its own, whose peak memory is reported, and removed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oq2vl_jax.bounds import Count, Seed, Share
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.errors import UserError
from oq2vl_jax.memory import check_fits, host_bytes

ROWS_PER_FILE = 500_000
"""As in DataComp's medium pool: 128M rows in 253 files."""
BYTES_PER_ROW, BYTES_ON_DISK = 60, 45
"""Least memory and disk for a row of made-up metadata: an id, a caption, sizes, a score."""
EXPRESSION = "clip_l14_top(0.3) & basic | uids({folder}/subset.npy)"
MEMBERSHIP_UIDS = 4_000_000
WORDS = ("a", "red", "photograph", "of", "the", "harbour", "dog", "view", "old", "beautiful")


@dataclass(frozen=True)
class Filter:
    """Uid membership, and `clip_l14_top(0.3) & basic | uids(...)` over made-up metadata, with the peak memory."""

    num_rows: Count = 4_000_000
    subset_share: Share = 0.2
    """Share of the rows that are in the uid set."""
    language: bool = False
    """Also apply the language rule of `basic`; no two captions are equal, which is its worst case."""
    folder: str | None = None
    """Folder in which metadata is made and removed; None: the system's temporary folder."""
    seed: Seed = 0
    repeats: Count = 3
    """Runs of each measurement; the fastest counts."""
    json: bool = False


OPTIONS = Filter


def measure(config: Filter) -> list[dict]:
    parent = config.folder or tempfile.gettempdir()
    if not os.path.isdir(parent):
        raise UserError(f"--folder {parent}: no such folder.")
    label, number = f"metadata of {config.num_rows:,} rows", config.num_rows
    check_fits(label, BYTES_PER_ROW * number, host_bytes(), "this machine", "take fewer --num-rows")
    free = shutil.disk_usage(parent).free
    check_fits(label, BYTES_ON_DISK * number, free, f"{parent}, by free space,", "take fewer --num-rows or a --folder")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        write_metadata(folder, config.num_rows, config.subset_share, config.seed)
        rules = folder / "rules.toml"
        language = "en" if config.language else ""
        rules.write_text(f'expression = "{EXPRESSION.format(folder=folder)}"\n[basic]\nlanguage = "{language}"\n')
        runs = [filtered(folder) for _ in range(config.repeats)]
        kept = json.loads((folder / "out" / "report.json").read_text())["kept"]
        seconds, peak = min(run[0] for run in runs), max(run[1] for run in runs)
        asked, membership = membership_seconds(folder, config)
    rules = "four rules, of them the language" if config.language else "three rules"
    return [
        {"what": "uid membership", "rows": asked, "seconds": membership, "rows_per_second": asked / membership},
        {"what": f"{rules}, {kept} kept", "rows": config.num_rows, "seconds": seconds,
         "rows_per_second": config.num_rows / seconds, "peak_gib": peak / 2**30},
    ]  # fmt: skip


def filtered(folder: Path) -> tuple[float, int]:
    """Runs the command over the folder's metadata; returns its seconds, from start to end, and its peak bytes."""
    command = [sys.executable, "-m", "oq2vl_jax.curate.filter", str(folder / "rules.toml"),
               "--metadata", str(folder / "*.parquet"), "--out", str(folder / "out")]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the filter ended with exit code {process.returncode}; its own words stand above")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def membership_seconds(folder: Path, config: Filter) -> tuple[int, float]:
    """Returns (uids asked for, seconds) of asking the subset for the first rows."""
    number = min(config.num_rows, MEMBERSHIP_UIDS)
    uids = np.concatenate([halves for halves, _ in pieces(number, config.seed)]).astype(np.uint64)
    seconds = []
    for _ in range(config.repeats):
        subset = UidSet.load(str(folder / "subset.npy"))
        start = time.perf_counter()
        subset.contains(uids[:, 0], uids[:, 1])
        seconds.append(time.perf_counter() - start)
    return number, min(seconds)


def pieces(num_rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
    """Yields for each file its ids as halves, big-endian [rows, 2], and the generator of its other columns."""
    for start in range(0, num_rows, ROWS_PER_FILE):
        rng = np.random.default_rng((seed, start))
        yield np.frombuffer(rng.bytes(16 * min(ROWS_PER_FILE, num_rows - start)), ">u8").reshape(-1, 2), rng


def write_metadata(folder: Path, num_rows: int, subset_share: float, seed: int) -> None:
    """Writes DataComp-like metadata, captions of 1-12 words and a number of their own, and the uid set subset.npy."""
    import polars as pl

    rng = np.random.default_rng(seed)
    captions = pl.Series([" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(10_000)])
    subset = []
    for i, (halves, rng) in enumerate(pieces(num_rows, seed)):
        number = len(halves)
        columns: dict[str, Any] = {
            "uid": uids_of(halves),
            "text": captions.gather(rng.integers(0, len(captions), number)) + numbers(i * ROWS_PER_FILE, number),
            "original_width": rng.integers(50, 2000, number),
            "original_height": rng.integers(50, 2000, number),
            "clip_l14_similarity_score": rng.normal(0.2, 0.05, number).astype(np.float32),
        }
        pl.DataFrame(columns).write_parquet(folder / f"{i:08d}.parquet")
        subset.append(halves[rng.random(number) < subset_share].astype(np.uint64))
    high, low = np.concatenate(subset).T
    UidSet(high, low).save(str(folder / "subset.npy"))


def uids_of(halves: np.ndarray) -> list[str]:
    text = halves.tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def numbers(start: int, count: int) -> Any:
    """Returns " START", " START + 1" and so on as a Polars series."""
    import polars as pl

    return " " + pl.Series(np.arange(start, start + count)).cast(pl.String)
