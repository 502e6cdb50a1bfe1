"""Our train step against those of other JAX trainers, on the same rows of text, in turns: `make bench-peers-jax`.

    python -m tests.peers.compare_jax --python maxtext=DIR/bin/python --python easydel=DIR/bin/python

Every peer runs in turns with ours, each alone in a process of the peer's environment, so that both have the same jax.
Rows of configs/bench_mid.py without pictures: 25 % of the positions are labelled, then all. Weights are random and
differ, and first losses with them. A peer that does not run is named, and the others are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from oq2vl_jax.config_files import load_config
from tests.peers.outcome import untried, why_it_ended
from tests.peers.step_ours import CONFIG
from tests.peers.text_rows import write_text_rows

LABELLED = (0.25, 1.0)
PEERS = ("maxtext", "easydel")
OURS = "ours beside "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pythons = dict(word.split("=", 1) for word in options.python)
    if unknown := set(pythons) - set(PEERS):
        parser.error(f"--python: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    found = {f"{share:.0%}": compared(share, pythons, options.rounds, options.steps) for share in LABELLED}
    print(json.dumps(found) if options.json else "\n\n".join(table(share, sides) for share, sides in found.items()))


def compared(labelled: float, pythons: dict[str, str], rounds: int, steps: int) -> dict[str, dict]:
    """{peer, or "ours beside PEER": {"seconds", "median", "first_loss", "jax", "masks"} or {"failed": why}}."""
    config, commands = load_config(CONFIG), {}
    for peer, python in (pythons or {"nobody": sys.executable}).items():
        commands[OURS + peer] = [python, "-m", "tests.peers.step_ours"]
        if peer in PEERS:
            commands[peer] = [python, f"tests/peers/step_{peer}.py"]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        vocabulary = config.model.image_token_id
        write_text_rows(rows, config.global_batch_size, config.data.num_tokens, vocabulary, labelled, seed=0)
        sides: dict[str, dict] = {}
        for _ in range(rounds):
            for side, command in commands.items():
                if "failed" not in sides.get(side, {}):
                    sides[side] = merged(sides.get(side), ran([*command, str(rows), "--steps", str(steps)]))
    return sides


def ran(command: list[str]) -> dict:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return {"failed": f"does not start ({error}); the others are compared"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": why_it_ended(done.returncode, done.stderr)}


def merged(before: dict | None, found: dict) -> dict:
    if "failed" in found:
        return found
    seconds = (before["seconds"] if before else []) + found["seconds"]
    return found | {"seconds": seconds, "median": statistics.median(seconds)}


def table(share: str, sides: dict[str, dict]) -> str:
    lines = [f"{share} of the positions labelled"]
    for side, found in sides.items():
        if "failed" in found:
            lines.append(f"{side:20s} {found['failed']}")
            continue
        ours = sides.get(OURS + side, {}).get("median")
        ratio = f", ours is {found['median'] / ours:.2f} times as fast" if ours else ""
        lines.append(
            f"{side:20s} {found['median']:7.2f} s a step (least {min(found['seconds']):.2f}){ratio}; "
            f"loss {found['first_loss']:.3f}, jax {found['jax']}; {found['masks']}"
        )
        lines += untried({side: found["version"]} if "version" in found else {})
    return "\n".join(lines)


if __name__ == "__main__":
    main()
