"""EasyDeL's train step on the rows of text_rows.py: PYTHON step_easydel.py ROWS.npz [--steps 3] [KEY=JSON ..]

Its own Trainer, training step, loss, optimizer and jit, with the decoder of configs/bench_mid.py in float32. Runs in an
environment of its own (make bench-peers-jax). KEY=JSON: of its Qwen2Config. Prints a line of JSON.

Its Qwen2 drops the segment_ids of a batch without a word, and packed documents then see each other; here the batch has
a MaskInfo of the documents in their place, which Qwen2 takes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version

os.environ |= {"JAX_PLATFORMS": "cpu", "EASYDEL_AUTO": "false", "WANDB_MODE": "disabled"}

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from easydel.infra.loss_utils import LossConfig
from ejkernel.types import MaskInfo
from flax import nnx

MODEL = {
    "vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "attn_dtype": jnp.float32, "attn_softmax_dtype": jnp.float32, "kvdtype": jnp.float32,
}  # fmt: skip
FASTEST = {
    "attn_mechanism": "vanilla", "gradient_checkpointing": ed.EasyDeLGradientCheckPointers.NONE, "scan_layers": False,
    "use_sliding_window": False, "sharding_axis_dims": (1, 1, 1, 1, 1),
}  # fmt: skip
"""The fastest settings that were found on a CPU."""
ROWS_OF_DATASET = 200


def trainer_of(rows, changes):
    number, length = rows["tokens"].shape
    settings = MODEL | FASTEST | {"max_position_embeddings": length}
    settings |= {key: json.loads(value) for key, value in (change.split("=", 1) for change in changes)}
    chunk = settings.pop("lmhead_chunksize", None)
    model = ed.Qwen2ForCausalLM(
        config=ed.Qwen2Config(**settings), dtype=jnp.float32, param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0),
    )  # fmt: skip
    arguments = ed.TrainingArguments(
        save_directory=tempfile.mkdtemp(), model_name="peer", num_train_epochs=1, total_batch_size=number,
        max_length=length, learning_rate=5e-5, optimizer=ed.EasyDeLOptimizers.ADAMW, weight_decay=0.01, clip_grad=1.0,
        scheduler=ed.EasyDeLSchedulers.COSINE, warmup_steps=3, max_training_steps=100,
        loss_config=LossConfig(shift_tokens=False), lmhead_chunksize=chunk, do_last_save=False, save_steps=None,
        use_wandb=False, report_metrics=False, log_grad_norms=False, resume_if_possible=False, do_eval=False,
    )  # fmt: skip
    times = -(-ROWS_OF_DATASET // number)
    dataset = {
        "input_ids": np.tile(rows["tokens"], (times, 1)).tolist(),
        "labels": np.tile(rows["labels"], (times, 1)).tolist(),
    }
    return ed.Trainer(arguments=arguments, model=model, dataset_train=Dataset.from_dict(dataset))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=3)
    options, changes = parser.parse_known_args()
    stdout, sys.stdout = sys.stdout, sys.stderr  # EasyDeL prints a lot
    rows = {name: x.astype(np.int32) for name, x in np.load(options.rows).items()}
    trainer = trainer_of(rows, changes)
    batch = {"input_ids": rows["tokens"], "labels": rows["labels"], "position_ids": rows["positions"]}
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    batch["mask_info"] = MaskInfo.from_segments(jnp.asarray(rows["segment_ids"] - 1))  # -1 is padding there
    state, losses, seconds = trainer.model_state, [], []
    with trainer.mesh:
        for _ in range(1 + options.steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(
                trainer.sharded_training_step_function(
                    state, batch, *trainer._train_shared_fn_extra_args, *trainer._train_shared_fn_static_args
                )
            )
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - start)
    found = {"first_loss": losses[0], "seconds": seconds[1:], "jax": jax.__version__, "version": version("easydel")}
    print(json.dumps(found | {"masks": "documents apart by a MaskInfo; logits of every position"}), file=stdout)


if __name__ == "__main__":
    main()
