"""The tiny configuration of configs/tiny.py and a model of it."""

import dataclasses

import jax
import pytest

from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import load_config
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL

TINY = load_config("configs/tiny.py")


def tiny_model():
    return OpenQwen2VL(jax.random.key(0), TINY.model)


@pytest.fixture
def tiny_config(tmp_path):
    """configs/tiny.py with its run directory in tmp_path and replaced fields."""

    def make(run_dir="run", **overrides) -> TrainConfig:
        return dataclasses.replace(TINY, run_dir=str(tmp_path / run_dir), **overrides)

    return make
