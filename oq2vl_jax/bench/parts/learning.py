"""Part g: trains on generated pictures in bfloat16 and in float32, to see whether the loss falls alike.

The configuration is configs/easy_vqa.py, or the one given to the report.

A picture is one coloured square, disc or triangle on white; its caption is a token for the colour and one for the
shape. Rows have the packer's layout, but need no tokenizer or files.
"""

import dataclasses
from typing import Any

import numpy as np

from oq2vl_jax.bench.parts.setting import Setting, as_floats
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import load_config
from oq2vl_jax.data.loading.batch import IGNORE, Batch

COLOURS = ((220, 40, 40), (40, 160, 60), (40, 60, 220), (230, 200, 40))
NUM_SHAPES = 3
FIRST_COLOUR, FIRST_SHAPE = 10, 20
"""Token ids of the captions."""
GPU_STEPS, CPU_STEPS, LAST = 200, 20, 10


def measure(setting: Setting) -> dict[str, Any]:
    """Returns the losses in both types. last: mean of the last ten steps. chance: loss of guessing colour and shape."""
    config = load_config("configs/easy_vqa.py" if setting.is_default else setting.config)
    number = GPU_STEPS if setting.is_gpu else CPU_STEPS
    if not setting.is_gpu:
        config = dataclasses.replace(config, global_batch_size=4, rows_per_device=None)
    losses = {dtype: train(config, dtype, number) for dtype in ("float32", "bfloat16")}
    last = {dtype: float(np.mean(values[-LAST:])) for dtype, values in losses.items()}
    return {
        "num_steps": number,
        "losses": losses,
        "first": {dtype: values[0] for dtype, values in losses.items()},
        "last": last,
        "chance": float(np.log(len(COLOURS)) + np.log(NUM_SHAPES)) / 2,
    }


def train(config: TrainConfig, dtype: str, number: int) -> list[float]:
    import jax

    from oq2vl_jax.sharding import make_mesh, to_global_batch
    from oq2vl_jax.train.attention_choice import checked_compute
    from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings

    config = dataclasses.replace(config, compute_dtype=dtype)  # type: ignore[arg-type]
    mesh = make_mesh(config.mesh)
    compute = checked_compute(config, mesh)
    shardings, step = state_shardings(config, mesh), compile_train_step(config, mesh, compute)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(config.seed))
    rng, losses = np.random.default_rng(config.seed), []
    for _ in range(number):
        state, metrics = step(state, to_global_batch(captioned_rows(config, rng), mesh))
        losses.append(metrics.loss)
    return as_floats(losses)


def captioned_rows(config: TrainConfig, rng: np.random.Generator) -> Batch:
    """Returns a batch of rows filled with captioned pictures."""
    num_rows, num_tokens, visual = config.global_batch_size, config.data.num_tokens, config.model.num_visual_tokens
    length, size = visual + 2, config.model.vision.image_size
    tokens, positions, segments = np.zeros((3, num_rows, num_tokens), np.int32)
    labels = np.full((num_rows, num_tokens), IGNORE, np.int32)
    images = np.zeros((num_rows, config.data.max_images, size, size, 3), np.uint8)
    for row in range(num_rows):
        for slot in range(min(config.data.max_images, num_tokens // length)):
            colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(NUM_SHAPES))
            images[row, slot] = picture(colour, shape, size, rng)
            start = slot * length
            end = start + length
            tokens[row, start:end] = config.model.image_token_id
            tokens[row, end - 2 : end] = FIRST_COLOUR + colour, FIRST_SHAPE + shape
            positions[row, start:end], segments[row, start:end] = np.arange(length), slot + 1
            labels[row, end - 3 : end - 1] = FIRST_COLOUR + colour, FIRST_SHAPE + shape
    return Batch(tokens, labels, positions, segments, images)


def picture(colour: int, shape: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a square, a disc or a triangle at a random place on white; uint8 [size, size, 3]."""
    radius = size * rng.uniform(0.2, 0.35)
    x, y = (rng.uniform(radius, size - radius) for _ in "xy")
    rows, columns = np.mgrid[:size, :size] - np.array([y, x])[:, None, None]
    is_inside = (
        np.maximum(abs(rows), abs(columns)) < radius,
        rows**2 + columns**2 < radius**2,
        (abs(rows) < radius) & (abs(columns) < (rows + radius) / 2),
    )[shape]
    return np.where(is_inside[..., None], np.array(COLOURS[colour]), 255).astype(np.uint8)
