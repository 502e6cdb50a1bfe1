"""MaxText's train step on the rows of text_rows.py: PYTHON step_maxtext.py ROWS.npz [--steps 3] [KEY=VALUE ..]

Its own setup_train_loop, train_step, loss, optimizer and jit, with the decoder of configs/bench_mid.py in float32. Runs
in an environment of its own (make bench-peers-jax). KEY=VALUE: of MaxText's configuration. Prints a line of JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version

os.environ |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "TF_CPP_MIN_LOG_LEVEL": "2"}

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

MODEL = {
    "override_model_config": True, "decoder_block": "qwen2", "base_emb_dim": 512, "base_num_query_heads": 8,
    "base_num_kv_heads": 2, "head_dim": 64, "base_mlp_dim": 2048, "base_num_decoder_layers": 8, "vocab_size": 151_936,
    "mlp_activations": '["silu", "linear"]', "normalization_layer_epsilon": 1e-6, "rope_max_timescale": 1_000_000,
    "attention_bias": True, "use_qk_norm": False, "logits_via_embedding": True, "normalize_embedding_logits": False,
    "dtype": "float32", "weight_dtype": "float32", "grad_dtype": "float32", "matmul_precision": "float32",
}  # fmt: skip
TRAINING = {
    "run_name": "peer", "hardware": "cpu", "skip_jax_distributed_system": True, "dataset_type": "synthetic",
    "enable_checkpointing": False, "enable_goodput_recording": False, "log_config": False, "jax_cache_dir": "",
    "steps": 100, "enable_dropout": False, "opt_type": "adamw", "learning_rate": 5e-5, "adam_b2": 0.999,
    "adam_weight_decay": 0.01, "gradient_clipping_threshold": 1.0,
}  # fmt: skip
FASTEST = {"attention": "dot_product", "scan_layers": False, "remat_policy": "none", "num_vocab_tiling": 8}
"""The fastest settings that were found on a CPU."""


def batch_of(rows):
    """MaxText's batch. A label counts where targets_segmentation is not 0."""
    is_labelled = rows["labels"] >= 0
    batch = {
        "inputs": rows["tokens"], "inputs_position": rows["positions"], "inputs_segmentation": rows["segment_ids"],
        "targets": np.where(is_labelled, rows["labels"], 0), "targets_position": rows["positions"],
        "targets_segmentation": np.where(is_labelled, rows["segment_ids"], 0),
    }  # fmt: skip
    return {name: np.asarray(x, np.int32) for name, x in batch.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=3)
    options, changes = parser.parse_known_args()
    rows = np.load(options.rows)
    number, length = rows["tokens"].shape
    settings = MODEL | TRAINING | FASTEST | {"max_target_length": length, "per_device_batch_size": number}
    settings |= {"base_output_directory": tempfile.gettempdir()} | dict(change.split("=", 1) for change in changes)
    stdout, sys.stdout = sys.stdout, sys.stderr  # MaxText prints a lot
    base = os.path.join(os.path.dirname(pyconfig.__file__), "base.yml")
    words = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items())
    config = pyconfig.initialize([sys.argv[0], base, *words])
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(config, None)
    graph, state = nnx.split(state)
    of_parameters, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, of_parameters
    )
    batch = jax.device_put(batch_of(rows), sharding.get_input_data_sharding(config, mesh))
    losses, seconds = [], []
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        for _ in range(1 + options.steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["scalar"]["learning/loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
    found = {"first_loss": losses[0], "seconds": seconds[1:], "jax": jax.__version__, "version": version("maxtext")}
    print(json.dumps(found | {"masks": "documents apart; logits of every position"}), file=stdout)


if __name__ == "__main__":
    main()
