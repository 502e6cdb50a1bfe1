"""Configurations that cannot run are one sentence."""

import dataclasses

import pytest

from oq2vl_jax.config import DataConfig, MeshConfig, OnlineConfig, SyntheticConfig, TrainableConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.train.checks import check_config
from oq2vl_jax.train.run import run
from tests.train.conftest import TINY


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"global_batch_size": 12}, "global_batch_size = 12 cannot be divided over 8 devices; use a multiple of 8"),
        ({"rows_per_device": 3}, "rows_per_device = 3 on 8 devices does not divide global_batch_size = 8"),
        ({"mesh": MeshConfig(3, -1)}, "mesh.data = 3 times mesh.fsdp = -1 does not fit 8 devices"),
        ({"num_steps": 0}, "num_steps must be 1 to 2,147,483,647, got 0"),
        ({"trainable": TrainableConfig(False, False, False)}, "nothing is trained"),
        ({"data": DataConfig(128, 8)}, "data.sources is empty"),
    ],
)
def test_impossible_configurations_are_one_sentence(tiny_config, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tiny_config(**overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "packed"}, "data.sources is empty"),
        ({"kind": "online", "sources": ("a.tar",)}, "data.kind = online needs data.online.tokenizer"),
        (
            {"sources": ("packed",)},
            "data.kind = synthetic makes its own rows; leave data.sources out, or set data.kind",
        ),
        ({"weights": (1.0,)}, "data.kind = synthetic mixes no data.weights"),
        ({"online": OnlineConfig(window=8)}, "data.online is set, but data.kind is synthetic; set data.kind = online"),
        (
            {"kind": "packed", "sources": ("packed",), "synthetic": SyntheticConfig(8)},
            "data.synthetic is set, but data.kind is packed; set data.kind = synthetic, or leave it out",
        ),
    ],
)
def test_settings_of_another_kind_of_data_are_refused(changes, message):
    config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, **changes))
    with pytest.raises(UserError, match=message):
        check_config(config, num_devices=8)
