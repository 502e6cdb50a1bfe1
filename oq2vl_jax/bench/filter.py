"""Measures filtering: uid membership, and a three-rule expression over metadata, from parquet files to a uid set."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oq2vl_jax.bounds import Count, Seed, Share
from oq2vl_jax.curate.filter.apply import apply_rules, load_filter
from oq2vl_jax.curate.filter.pool import read_pool
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.memory import check_fits, host_bytes

BYTES_PER_ROW = 250
"""Least host memory for a row of made-up metadata: an id as text and as numbers, a caption, sizes, a score."""
EXPRESSION = "clip_l14_top(0.3) & basic | uids({folder}/subset.npy)"


@dataclass(frozen=True)
class Filter:
    """Uid membership, and `clip_l14_top(0.3) & basic | uids(...)` over made-up metadata, without the language rule."""

    num_rows: Count = 4_000_000
    subset_share: Share = 0.2
    """Share of the rows that are in the uid set."""
    seed: Seed = 0
    repeats: Count = 3
    """Runs of each measurement; the fastest counts."""
    json: bool = False


OPTIONS = Filter


def write_metadata(folder: Path, num_rows: int, subset_share: float, seed: int) -> None:
    """Writes DataComp-like metadata with random captions of 1-12 words in eight files, and the uid set subset.npy."""
    import polars as pl

    rng = np.random.default_rng(seed)
    words = np.array(["a", "red", "photograph", "of", "the", "harbour", "dog", "view", "old", "beautiful"])
    captions = np.array([" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(10_000)])
    raw = rng.bytes(16 * num_rows).hex()
    frame = pl.DataFrame(
        {
            "uid": [raw[start : start + 32] for start in range(0, len(raw), 32)],
            "text": captions[rng.integers(0, len(captions), num_rows)],
            "original_width": rng.integers(50, 2000, num_rows),
            "original_height": rng.integers(50, 2000, num_rows),
            "clip_l14_similarity_score": rng.normal(0.2, 0.05, num_rows).astype(np.float32),
        }
    )
    for i, start in enumerate(range(0, num_rows, -(-num_rows // 8))):
        frame[start : start + -(-num_rows // 8)].write_parquet(folder / f"{i:08d}.parquet")
    halves = np.frombuffer(bytes.fromhex(raw), ">u8").reshape(-1, 2)
    chosen = rng.random(num_rows) < subset_share
    UidSet(halves[chosen, 0], halves[chosen, 1]).save(str(folder / "subset.npy"))


def measure(config: Filter) -> list[dict]:
    needed = BYTES_PER_ROW * config.num_rows
    check_fits(f"metadata of {config.num_rows:,} rows", needed, host_bytes(), "this machine", "take fewer --num-rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_metadata(folder, config.num_rows, config.subset_share, config.seed)
        rules = folder / "rules.toml"
        rules.write_text(f'expression = "{EXPRESSION.format(folder=folder)}"\n[basic]\nlanguage = ""\n')
        files = sorted(str(file) for file in folder.glob("*.parquet"))
        membership, filtering, kept = [], [], 0
        for _ in range(config.repeats):
            start = time.perf_counter()
            selection = load_filter(str(rules))
            pool = read_pool(files, [], selection.rules)
            kept = len(apply_rules(selection, pool).uids)
            filtering.append(time.perf_counter() - start)
            uids = UidSet.load(str(folder / "subset.npy"))
            start = time.perf_counter()
            uids.contains(pool.high, pool.low)
            membership.append(time.perf_counter() - start)
    measured = {"uid membership": min(membership), f"three rules, {kept} kept": min(filtering)}
    return [
        {"what": label, "rows": config.num_rows, "seconds": seconds, "rows_per_second": config.num_rows / seconds}
        for label, seconds in measured.items()
    ]
