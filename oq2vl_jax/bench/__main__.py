"""python -m oq2vl_jax.bench NAME [OPTIONS]: measurements of the parts, printed as a table or as JSON (--json).

step      the train step on synthetic rows: tokens/s, MFU, memory, breakdown
plan      the train step compiled for GPUs that are not there: memory, collectives, floor, what fits
fits      which models fit which GPUs, by the step that takes least memory
data      the loader: rows/s alone, and what a step waits for it
packing   bin assignment alone
pack      tars to packed rows, end to end, against the published approach
rows      reading packed rows: random access and decoding
filter    uid membership and a filter expression over metadata, with the peak memory
reshard   tars to the samples that were kept
quality   steps and seconds of training until the held-out loss reaches a target
tuning    packed conversations against padded batches
decode    generation, against transformers' generate on the exported model
report    everything that a device can tell, in one command and one page
"""

import importlib
import json
import sys

from oq2vl_jax.bounds import parse
from oq2vl_jax.errors import UserError, hint, run_command

PROG = "python -m oq2vl_jax.bench"
NAMES = (
    "step",
    "plan",
    "fits",
    "data",
    "packing",
    "pack",
    "rows",
    "filter",
    "reshard",
    "quality",
    "tuning",
    "decode",
    "report",
)
"""Modules of oq2vl_jax.bench; only the chosen one is imported. Each binds OPTIONS and measure, some show, exit_code."""


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: {__doc__}\n{PROG} NAME --help lists the options of one.")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv[1]
    if name not in NAMES:
        raise UserError(f"{name!r} is no measurement ({', '.join(NAMES)}){hint(name, NAMES)}.")
    module = importlib.import_module(f"oq2vl_jax.bench.{name}")
    config = parse(module.OPTIONS, prog=f"{PROG} {name}", args=sys.argv[2:])
    results = module.measure(config)
    if config.json:
        print(json.dumps(results))
    elif hasattr(module, "show"):
        module.show(results)
    else:
        print_table(results)
    return module.exit_code(results) if hasattr(module, "exit_code") else 0


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"
        return str(value)

    columns = list(dict.fromkeys(name for result in results for name in result))
    table = Table(*columns, box=None)
    for result in results:
        table.add_row(*(shown(result.get(name, "-")) for name in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    run_command(main)
