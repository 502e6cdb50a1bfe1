"""Opens the data of a run: packed folders, raw samples packed while training, or synthetic rows made first."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.loader import make_loader
from oq2vl_jax.data.packing.packed import check_files, fingerprint, tokenizer_folder
from oq2vl_jax.errors import UserError
from oq2vl_jax.runtime import is_first_process, wait_for_all


class Loader(Protocol):
    """An endless iterator over this process's share of the global batches, restored exactly from its state."""

    def __iter__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


class OpenData(NamedTuple):
    """tokenizer: its folder. identity: a digest of the rows, compared on a restart. skipped: counts by reason, live."""

    loader: Loader
    tokenizer: Path
    identity: str
    skipped: Mapping[str, int]


def open_data(config: TrainConfig, run_dir: Path) -> OpenData:
    """Opens what data.kind names. Raises UserError if it does not fit the configuration."""
    openers = {"packed": open_packed, "online": open_online, "synthetic": open_synthetic}
    return openers[config.data.kind](config, run_dir)


def open_packed(config: TrainConfig, run_dir: Path) -> OpenData:
    data = config.data
    for path in data.sources:
        check_files(path, is_whole=data.verify == "full")
    seed = data.seed_of(config.seed)
    loader = make_loader(data, config.model, config.global_batch_size, seed, jax.process_index(), jax.process_count())
    return OpenData(loader, tokenizer_folder(data.sources[0]), fingerprint(data.sources), {})


def open_online(config: TrainConfig, run_dir: Path) -> OpenData:
    from oq2vl_jax.data.loading.online import OnlineLoader, online_fingerprint, prepare_tokenizer

    if jax.process_count() > 1:
        raise UserError("data.kind = online runs in one process; pack with oq2vl_jax.data.pack for several.")
    tokenizer = prepare_tokenizer(config.data, run_dir / "tokenizer")
    loader = OnlineLoader(
        config.data, config.model, config.global_batch_size, config.data.seed_of(config.seed), tokenizer
    )
    return OpenData(loader, tokenizer, online_fingerprint(config.data, tokenizer), loader.skipped)


def open_synthetic(config: TrainConfig, run_dir: Path) -> OpenData:
    """Makes the rows once, in the first process, and opens them like any packed folder."""
    from oq2vl_jax.data.packing.synthetic import make_synthetic_source

    if is_first_process():
        make_synthetic_source(run_dir / "data", config)
    wait_for_all("synthetic data")
    source = make_synthetic_source(run_dir / "data", config)
    data = dataclasses.replace(config.data, kind="packed", sources=(source,))
    return open_packed(dataclasses.replace(config, data=data), run_dir)
