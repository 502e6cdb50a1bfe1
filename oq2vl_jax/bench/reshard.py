"""Measures resharding: tars of photographs of which a share of the samples is copied to new tars."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oq2vl_jax.bench.photo_shards import write_photo_shards
from oq2vl_jax.bounds import Seed, Share, SmallCount, Workers
from oq2vl_jax.curate.reshard import ReshardConfig, reshard
from oq2vl_jax.data.samples.ids import parse_uid
from oq2vl_jax.data.samples.shards import read_samples
from oq2vl_jax.data.samples.uids import UidSet
from oq2vl_jax.jobs import Execution


@dataclass(frozen=True)
class Reshard:
    """Samples and bytes read per second by curate.reshard. The tars were just written, so the system has them in
    memory: a disk or a network may be slower."""

    num_shards: SmallCount = 6
    samples_per_shard: SmallCount = 10_000
    """As in DataComp."""
    kept_share: Share = 0.155
    """Share of the samples that is kept; 19.9M of 128M in the published mixture."""
    num_workers: Workers = os.cpu_count() or 1
    seed: Seed = 0
    json: bool = False


OPTIONS = Reshard


def measure(config: Reshard) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_photo_shards(folder, config.num_shards, config.samples_per_shard, config.seed)
        uids = [parse_uid(sample.uid) for shard in shards for sample in read_samples(shard)]
        high, low = np.array(uids, np.uint64).T
        chosen = np.random.default_rng(config.seed).random(len(uids)) < config.kept_share
        UidSet(high[chosen], low[chosen]).save(str(folder / "uids.npy"))
        num_bytes = sum(Path(shard).stat().st_size for shard in shards)
        start = time.perf_counter()
        manifest = reshard(
            ReshardConfig(
                shards=f"{folder}/*.tar",
                uids=str(folder / "uids.npy"),
                out=str(folder / "out"),
                tars_per_task=max(1, config.num_shards // config.num_workers),
                execution=Execution(num_workers=config.num_workers),
            )
        )
        seconds = time.perf_counter() - start
    assert manifest is not None
    assert manifest["written"] == chosen.sum(), (manifest["written"], chosen.sum())
    return [
        {"samples": len(uids), "kept": int(chosen.sum()), "seconds": seconds, "samples_per_second": len(uids) / seconds,
         "mb_per_second": num_bytes / seconds / 1e6}
    ]  # fmt: skip
