"""The state that a run starts from: its newest checkpoint, the weights of another one, or fresh weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oq2vl_jax.checkpoint import load_optimizer, open_checkpoint, step_folder
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.text.tokenizer import tokenizer_sha256
from oq2vl_jax.errors import UserError
from oq2vl_jax.model.adapters import without_adapters
from oq2vl_jax.runtime import is_first_process
from oq2vl_jax.train.checkpointer import Checkpointer
from oq2vl_jax.train.checks import check_same_model
from oq2vl_jax.train.open_data import OpenData
from oq2vl_jax.train.parts import split_trainable
from oq2vl_jax.train.step import TrainState, init_train_state, shapes_with, state_shardings
from oq2vl_jax.train.totals import Totals
from oq2vl_jax.trees import from_named_arrays, named_arrays, split_parts
from oq2vl_jax.weights import Base, base_of, load_weights, recorded_base


def start_state(
    config: TrainConfig, mesh: Mesh, checkpointer: Checkpointer, data: OpenData, run_dir: Path
) -> tuple[TrainState, Totals, Base | None]:
    """Restores the run's newest checkpoint and sets the loader to it. Else starts afresh, or from init_from.

    run_dir: the local one. Also returns the base that the run's checkpoints record, if it has adapters.
    """
    shardings = state_shardings(config, mesh)
    step = checkpointer.latest_step()
    if step is not None:
        state, loader_state = checkpointer.restore(step, shapes_with(config, shardings), config)
        if loader_state["data"] != data.identity:
            raise UserError(
                f"the packed data is not what checkpoint {step} of {config.run_dir} was trained on; put the old rows "
                "back, or start another run with --init-from."
            )
        data.loader.set_state(loader_state["position"])
        if is_first_process():
            print(f"resuming from step {step}")
        base = recorded_base(step_folder(run_dir, step))
        return state, Totals(jax.process_count(), loader_state.get("totals")), base
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(config.seed))
    base = None
    if config.init_from is not None:
        source = open_checkpoint(config.init_from, with_optimizer=config.init_optimizer)
        state = started_from(source, state, config, shardings, data)
        base = None if config.lora.rank is None else base_of(source)
    return state, Totals(jax.process_count(), {}), base


def started_from(
    source: Path, state: TrainState, config: TrainConfig, shardings: TrainState, data: OpenData
) -> TrainState:
    """Returns the state with the weights of a checkpoint in config.init_parts, and its optimizer's state if asked."""
    if tokenizer_sha256(source / "tokenizer") != tokenizer_sha256(data.tokenizer):
        raise UserError(
            f"init_from {source}: its tokenizer is not the one the data was packed with ({data.tokenizer})."
        )
    whole = without_adapters(shapes_with(config, shardings).model)
    given, _ = split_parts(whole, lambda path: path[0].name in config.init_parts)
    drawn = named_arrays(state.model)
    for name in named_arrays(given):
        drawn.pop(name).delete()  # before the others arrive: both do not fit
    model = from_named_arrays(state.model, drawn | named_arrays(load_weights(source, given)))
    check_same_model(source, config)
    state = state._replace(model=model)
    if config.ema.decay is not None:
        state = state._replace(ema=jax.tree.map(jnp.copy, split_trainable(model, config)[0]))
    if config.init_optimizer:
        state = state._replace(opt_state=load_optimizer(source, shapes_with(config, shardings).opt_state))
    return state
