"""Another loss: the cross entropy plus z-loss (arXiv 2204.02311, section 5), which keeps the logits' scale in check.

python docs/examples/loss.py --run-dir runs/z_loss

No file of the package changes: a loss is a function handed to run.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.loading.batch import IGNORE
from oq2vl_jax.train.run import run

Z_LOSS = 1e-4


def loss(model, batch, compute):
    """Returns (sum over labelled tokens, number of labelled tokens) of a microbatch."""
    logits = model.logits(model(batch.tokens, batch.images, batch.segment_ids, batch.positions, compute))
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    is_labelled = batch.labels != IGNORE
    target = jnp.take_along_axis(logits, jnp.where(is_labelled, batch.labels, 0)[..., None], axis=-1)[..., 0]
    return ((log_norm - target + Z_LOSS * log_norm**2) * is_labelled).sum(), is_labelled.sum()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the tiny configuration with z-loss.")
    parser.add_argument("--run-dir", required=True)
    config = dataclasses.replace(load_config("tiny"), run_dir=parser.parse_args().run_dir, num_steps=4, log_every=1)
    run(config, loss=loss)
