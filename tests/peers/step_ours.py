"""Our train step on the rows of text_rows.py: python -m tests.peers.step_ours ROWS.npz [--steps 3] [KEY=VALUE ..]

Prints a line of JSON, as step_maxtext.py and step_easydel.py do: first_loss, seconds of the timed steps, jax, masks.
"""

import argparse
import json
import time

from oq2vl_jax.runtime import set_environment

CONFIG = "configs/bench_mid.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=3)
    options, changes = parser.parse_known_args()
    set_environment()
    import jax
    import numpy as np

    from oq2vl_jax.config_files import load_config, with_changes
    from oq2vl_jax.data.loading.batch import Batch
    from oq2vl_jax.sharding import make_mesh, to_global_batch
    from oq2vl_jax.train.attention_choice import checked_compute
    from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings

    rows = np.load(options.rows)
    number, length = rows["tokens"].shape
    given = [f"global_batch_size={number}", f"data.num_tokens={length}", "data.max_images=1", *changes]
    config = with_changes(load_config(CONFIG), given, "the arguments")
    size = config.model.vision.image_size
    batch = Batch(
        *(rows[name] for name in ("tokens", "labels", "positions", "segment_ids")),
        np.zeros((number, 1, size, size, 3), np.uint8),  # an empty place, which the encoder skips
    )
    mesh = make_mesh(config.mesh)
    compute, shardings = checked_compute(config, mesh), state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(0))
    step, batch = compile_train_step(config, mesh, compute), to_global_batch(batch, mesh)
    losses, seconds = [], []
    for _ in range(1 + options.steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "first_loss": losses[0], "seconds": seconds[1:], "jax": jax.__version__,
        "masks": "documents apart; logits of labelled positions only",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
