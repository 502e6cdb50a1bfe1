"""A training loop of one's own from the parts that run is made of, without checkpoints and resumption.

python docs/examples/own_loop.py --num-steps 20
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax

from oq2vl_jax.config_files import load_config
from oq2vl_jax.sharding import make_mesh, to_global_batch
from oq2vl_jax.train.open_data import open_data
from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings


def train(config):
    """Yields (step, metrics of the step) of the steps of a configuration; the state of the last one stays here."""
    mesh = make_mesh(config.mesh)
    data = open_data(config, Path(config.run_dir))
    shardings = state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(config.seed))
    step_once = compile_train_step(config, mesh)
    try:
        for step, batch in zip(range(1, config.num_steps + 1), data.loader, strict=False):
            state, metrics = step_once(state, to_global_batch(batch, mesh))  # (TrainState, StepMetrics)
            yield step, metrics
    finally:
        data.loader.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the tiny configuration in a loop of its own.")
    parser.add_argument("--num-steps", type=int, default=20)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(load_config("tiny"), num_steps=parser.parse_args().num_steps, run_dir=folder)
        for step, metrics in train(config):
            print(f"step {step}  loss {float(metrics.loss):.4f}  grad_norm {float(metrics.grad_norm):.3f}")
