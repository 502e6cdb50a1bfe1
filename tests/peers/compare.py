"""Our train step against PyTorch's, on the same weights and the same rows, in turns: `make bench-peers`.

A side that ends early, for want of memory say, is named and the others are compared.

Each side has the machine to itself when it is its turn: a process that is started, warmed up, timed for some steps and
ended, in three rounds. (Side by side, waiting processes held so much memory that ours lost a third of its speed.) It
prints the median and the least seconds of a step, how many times as fast ours is, and the first losses beside what our
model says. On a CPU every round also measures the machine: the step's products alone, by jax and by PyTorch, and a copy
(machine.py). The share of a step that its products alone would take holds from machine to machine better than a ratio.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

from oq2vl_jax.runtime import set_environment
from tests.peers.machine import LIBRARIES
from tests.peers.outcome import untried, why_it_ended

SIDES = ("ours", "published", "best")
NOT_INSTALLED = "is left out: it needs the packages torch and transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/bench_mid.py")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn")
    parser.add_argument("--global-rows", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve_steps(options.side, options.config, options.global_rows)
        return
    result = compare(options.config, options.rounds, options.global_rows, options.steps)
    print(json.dumps(result) if options.json else table(result))


def compare(config: str, rounds: int, global_rows: int | None = None, steps: int = 3) -> dict:
    """Median seconds and first losses of each side, and how many times as fast ours is."""
    more = ["--global-rows", str(global_rows)] if global_rows else []
    about, first, seconds = {}, {}, {side: [] for side in SIDES}
    failed = {} if find_spec("torch") and find_spec("transformers") else dict.fromkeys(SIDES[1:], NOT_INSTALLED)
    machine: dict[str, list[dict]] = {library: [] for library in LIBRARIES if find_spec(library)}
    for _ in range(rounds):
        for side in (side for side in SIDES if side not in failed):
            command = [sys.executable, "-m", "tests.peers.compare", config, "--side", side, *more]
            with tempfile.TemporaryFile("w+", errors="replace") as words:
                pipe = subprocess.PIPE
                worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=words, text=True)
                try:
                    about[side], first[side] = ask(worker), ask(worker, "step")  # compiles
                    ask(worker, "step")
                    seconds[side] += [ask(worker, "step")["seconds"] for _ in range(steps)]
                except (EOFError, BrokenPipeError):
                    exit_code = worker.wait()
                    words.seek(0)
                    failed[side] = why_it_ended(exit_code, words.read())
                finally:
                    worker.kill()
                    worker.wait()
        if about["ours"]["device"] == "cpu":
            for library, found in machine.items():
                found.append(products_alone(config, library, more))
    if "ours" in failed:
        raise SystemExit(f"our own side {failed['ours']}")
    medians = {side: statistics.median(values) for side, values in seconds.items() if side not in failed}
    return {
        "about": about,
        "first_loss": {side: found["loss"] for side, found in first.items() if side not in failed},
        "expected_loss": {side: about["ours"][f"{side}_loss"] for side in medians if side != "ours"},
        "seconds": {side: values for side, values in seconds.items() if side not in failed},
        "median_seconds": medians,
        "times_as_fast": {side: medians[side] / medians["ours"] for side in medians if side != "ours"},
        "failed": failed,
        "machine": machine_figures(machine, medians["ours"]) if machine["jax"] else None,
    }


def products_alone(config: str, library: str, more: list[str]) -> dict:
    command = [sys.executable, "-m", "tests.peers.machine", config, library, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine_figures(found: dict[str, list[dict]], step_seconds: float) -> dict:
    """Medians over the rounds. share: of our step, the seconds of its products alone by the faster library."""
    figures = {}
    for library, rounds in found.items():
        figures[library] = {
            name: statistics.median(found[name] for found in rounds) for name, value in rounds[0].items()
            if isinstance(value, float)
        } | {"slowest": rounds[0]["slowest"]}  # fmt: skip
    least = min(figures[library]["seconds"] for library in found)
    return figures | {"share": least / step_seconds}


def ask(worker: subprocess.Popen, word: str | None = None) -> dict:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if word:
        worker.stdin.write(word + "\n")
        worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise EOFError


def serve_steps(side: str, path: str, global_rows: int | None) -> None:
    """One step for each line of standard input."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share a GPU
    if side == "ours":
        set_environment()
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
    config, rows, arrays = prepared(path, global_rows)
    step, about = (our_step if side == "ours" else torch_step)(side, config, rows, arrays)
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps({"loss": loss, "seconds": time.perf_counter() - start}), flush=True)


def prepared(path: str, global_rows: int | None):
    """(configuration, rows, weights by our names), the same in every process."""
    import jax
    import numpy as np

    from oq2vl_jax.bench.step import Step, configured
    from oq2vl_jax.bench.synthetic_rows import make_rows
    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
    from oq2vl_jax.trees import named_arrays

    config = configured(Step(path, global_rows=global_rows))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = jax.jit(lambda key: OpenQwen2VL(key, config.model))(jax.random.key(0))
        arrays = {name: np.asarray(x) for name, x in named_arrays(model).items()}
    return config, make_rows(config, config.global_batch_size), arrays


def our_step(side, config, rows, arrays):
    import jax

    from oq2vl_jax.sharding import make_mesh, to_global_batch
    from oq2vl_jax.train.attention_choice import checked_compute
    from oq2vl_jax.train.step import compile_train_step, init_train_state, state_shardings
    from oq2vl_jax.trees import from_named_arrays

    mesh = make_mesh(config.mesh)
    config = dataclasses.replace(config, attention=checked_compute(config, mesh).attention)
    shardings = state_shardings(config, mesh)
    state = jax.jit(lambda key: init_train_state(key, config), out_shardings=shardings)(jax.random.key(1))
    model = jax.tree.map(jax.device_put, from_named_arrays(state.model, arrays), shardings.model)
    state = state._replace(model=model)
    about = {"device": jax.devices()[0].device_kind, "dtype": config.compute_dtype} | expected_losses(
        config, mesh, rows, model
    )
    batch, compiled = to_global_batch(rows, mesh), compile_train_step(config, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics.loss)

    return step, about


def expected_losses(config, mesh, rows, model) -> dict:
    """What the peers should compute, by our model. published: row scope, means of microbatches averaged."""
    import jax
    import numpy as np

    from oq2vl_jax.data.loading.batch import IGNORE
    from oq2vl_jax.sharding import to_global_batch
    from oq2vl_jax.train.gradients import total_loss

    def loss_of(batch) -> float:
        one = dataclasses.replace(config, global_batch_size=len(batch.tokens), rows_per_device=1)
        total = jax.jit(lambda model, batch: total_loss(model, batch, one, mesh))(model, to_global_batch(batch, mesh))
        return float(total) / int((batch.labels != IGNORE).sum())

    everywhere = np.broadcast_to(np.arange(rows.tokens.shape[1], dtype=np.int32), rows.tokens.shape)
    in_row_scope = rows._replace(positions=everywhere, segment_ids=np.ones_like(rows.tokens))
    size = (config.rows_per_device or len(rows.tokens)) * mesh.size
    parts = [type(rows)(*(x[i : i + size] for x in in_row_scope)) for i in range(0, len(rows.tokens), size)]
    return {"best_loss": loss_of(rows), "published_loss": sum(map(loss_of, parts)) / len(parts)}


def torch_step(side, config, rows, arrays):
    import torch
    import transformers

    from tests.peers.torch_step import TorchStep

    peer = TorchStep(config, arrays, is_best=side == "best")
    return lambda: peer.step(rows), {
        "device": peer.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(result: dict) -> str:
    lines = [f"ours on {result['about']['ours']['device']}, {result['about']['ours']['dtype']}"]
    for side, seconds in result["median_seconds"].items():
        ratio = f"  ours is {result['times_as_fast'][side]:.2f} times as fast" if side != "ours" else ""
        loss = result["first_loss"][side]
        expected = f" (by our model {result['expected_loss'][side]:.6f})" if side != "ours" else ""
        least = min(result["seconds"][side])
        lines.append(f"{side:10s} {seconds:8.3f} s a step (least {least:.3f}){ratio}; loss {loss:.6f}{expected}")
    if machine := result["machine"]:
        for library in LIBRARIES:
            if (found := machine.get(library)) is None:
                continue
            lines.append(
                f"products of the step alone, by {library}: {found['seconds']:.3f} s, {found['gflops']:.0f} GFLOP/s; "
                f"slowest {found['slowest_gflops']:.0f} ({found['slowest']})"
            )
        copied = machine["jax"]["copy_gb_per_second"]
        lines.append(f"copy {copied:.1f} GB/s; the products are {machine['share']:.0%} of our step")
    others = [about for side, about in result["about"].items() if side != "ours"]
    lines += untried(others[0]) if others else []
    return "\n".join([*lines, *(f"{side} {why}" for side, why in result["failed"].items())])


if __name__ == "__main__":
    main()
