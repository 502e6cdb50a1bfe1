"""The PyTorch peers compute what ours computes: the same first loss, and after a step the same second one."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from oq2vl_jax.bench.synthetic_rows import make_rows
from oq2vl_jax.config import ScheduleConfig
from oq2vl_jax.config_files import load_config
from oq2vl_jax.sharding import make_mesh, to_global_batch
from oq2vl_jax.train.flops import executed_flops
from oq2vl_jax.train.metrics import work_of
from oq2vl_jax.train.step import compile_train_step, init_train_state
from oq2vl_jax.trees import named_arrays
from tests.peers.compare import expected_losses
from tests.peers.machine import products_of
from tests.peers.torch_step import TorchStep
from tests.train.conftest import TINY, tiny_model

LOSS_TOLERANCE = 5e-6  # relative; measured 4e-7
PRODUCTS_TOLERANCE = 0.1  # relative: the step's own count leaves padding out and adds half a chunk of images
SECOND_LOSS_TOLERANCE = 2e-4  # relative, after one AdamW step whose first update is a sign; measured 2e-5
CONFIG = dataclasses.replace(
    TINY,
    global_batch_size=8,
    rows_per_device=None,
    num_steps=10,
    trainable=dataclasses.replace(TINY.trainable, vision=False),
    optimizer=dataclasses.replace(TINY.optimizer, learning_rate=1e-3),
    schedule=ScheduleConfig(warmup_fraction=0.0),
)


def test_the_products_measured_alone_are_those_of_the_step():
    config = load_config("configs/bench_mid.py")
    work = work_of(make_rows(config, config.global_batch_size), config)
    alone = sum(product.times * product.flops for product in products_of(config, work.images, work.labelled))
    executed = executed_flops(config, work, config.rows_per_device or 1, config.global_batch_size)
    of_linears = executed.decoder + executed.logits + executed.vision
    print(f"{alone / of_linears - 1:.3f}")
    assert alone == pytest.approx(of_linears, rel=PRODUCTS_TOLERANCE)


@pytest.fixture(scope="module")
def setting():
    rows, mesh, model = make_rows(CONFIG, 8, seed=3), make_mesh(CONFIG.mesh), tiny_model()
    arrays = {name: np.asarray(x) for name, x in named_arrays(model).items()}
    return rows, arrays, expected_losses(CONFIG, mesh, rows, model)


@pytest.mark.parametrize("side", ["published", "best"])
def test_the_peer_computes_the_same_loss(side, setting):
    rows, arrays, expected = setting
    with torch.compiler.set_stance("force_eager"):
        peer = TorchStep(CONFIG, arrays, is_best=side == "best")
        found = peer.step(rows)
    print(f"{side}: {abs(found / expected[f'{side}_loss'] - 1):.1e}")
    assert found == pytest.approx(expected[f"{side}_loss"], rel=LOSS_TOLERANCE)


def test_the_best_form_takes_the_same_step(setting):
    rows, arrays, _ = setting
    mesh = make_mesh(CONFIG.mesh)
    state = init_train_state(jax.random.key(0), CONFIG)._replace(model=tiny_model())
    step, batch = compile_train_step(CONFIG, mesh), to_global_batch(rows, mesh)
    state, _ = step(state, batch)
    _, metrics = step(state, batch)
    with torch.compiler.set_stance("force_eager"):
        peer = TorchStep(CONFIG, arrays, is_best=True)
        peer.step(rows)
        second = peer.step(rows)
    print(f"second loss {abs(second / float(metrics.loss) - 1):.1e}")
    assert second == pytest.approx(float(metrics.loss), rel=SECOND_LOSS_TOLERANCE)
