"""A loss of one's own: distillation from a teacher checkpoint.

python docs/examples/own_loss.py --teacher runs/tiny --run-dir runs/student

The student is the tiny configuration. Its loss is half the cross entropy, half the cross entropy with the teacher's
probabilities. No file of the package changes: a loss is a function handed to run.
"""

import argparse
import dataclasses

import jax

import oq2vl_jax
from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.loading.batch import IGNORE
from oq2vl_jax.train.cross_entropy import token_losses
from oq2vl_jax.train.run import run


def distillation(teacher, model, batch, compute):
    """Returns (sum over labelled tokens, number of labelled tokens) of a microbatch."""
    inputs = (batch.tokens, batch.images, batch.segment_ids, batch.positions)
    logits = model.logits(model(*inputs, compute))
    whole = compute._replace(gather=None)  # under FSDP compute gathers the layers of the model that is trained
    wanted = jax.nn.softmax(teacher.logits(teacher(*inputs, whole)))
    from_teacher = -(wanted * jax.nn.log_softmax(logits)).sum(-1)
    is_labelled = batch.labels != IGNORE
    losses = (token_losses(logits, batch.labels * is_labelled) + from_teacher) / 2
    return (losses * is_labelled).sum(), is_labelled.sum()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the tiny configuration with a teacher.")
    parser.add_argument("--teacher", required=True, help="run directory")
    parser.add_argument("--run-dir", required=True)
    args = parser.parse_args()
    config = dataclasses.replace(load_config("tiny"), run_dir=args.run_dir, num_steps=4, log_every=1)
    run(config, loss=jax.tree_util.Partial(distillation, oq2vl_jax.load(args.teacher).model))
