"""oq2vl NAME [OPTIONS]: runs a command of the project by its short name; oq2vl NAME --help lists its options.

In a checkout the same commands are python -m MODULE, with the modules of COMMANDS.
"""

import importlib
import importlib.util
import runpy
import sys
from types import ModuleType

from oq2vl_jax.errors import UserError, hint, run_command

COMMANDS = {
    "train": ("oq2vl_jax.train", "train a configuration, or go on with its run"),
    "generate": ("oq2vl_jax.generate", "ask a checkpoint, one question or a file of them"),
    "eval": ("oq2vl_jax.eval", "benchmarks to results.json"),
    "serve": ("oq2vl_jax.serve", "a checkpoint behind OpenAI's chat format"),
    "pack": ("oq2vl_jax.data.pack", "tars, instruction files to packed rows"),
    "inspect": ("oq2vl_jax.data.inspect", "packed rows, or samples, as a page to look at"),
    "score": ("oq2vl_jax.curate.score", "captioned tars to parquet files of scores"),
    "filter": ("oq2vl_jax.curate.filter", "metadata and scores to a set of sample ids"),
    "ablate": ("oq2vl_jax.ablate", "arms x seeds of a definition, with a verdict"),
    "compare": ("oq2vl_jax.compare", "two runs, or groups of runs of several seeds"),
    "overlap": ("oq2vl_jax.curate.overlap", "training pictures that are a benchmark's"),
    "reshard": ("oq2vl_jax.curate.reshard", "the samples of such a set, from tars to new tars"),
    "from_hf": ("convert.from_hf", "Hugging Face weights to a checkpoint"),
    "from_clip": ("convert.from_clip", "a Hugging Face CLIP to a checkpoint that scores"),
    "from_prismatic": ("convert.from_prismatic", "a published checkpoint to a checkpoint"),
    "to_hf": ("convert.to_hf", "a checkpoint to a Hugging Face folder"),
    "to_prismatic": ("convert.to_prismatic", "a checkpoint to the published layout"),
    "ask_hf": ("convert.ask_hf", "ask an export with plain transformers"),
    "bench": ("oq2vl_jax.bench", "measurements"),
}
"""Name: (module, description)."""


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:15} {description}" for command, (_, description) in COMMANDS.items()]
        print("usage: oq2vl NAME [OPTIONS]\n", *lines, "\noq2vl NAME --help lists the options of one.", sep="\n")
        return
    if name not in COMMANDS:
        raise UserError(f"{name!r} is no command{hint(name, COMMANDS)}; oq2vl --help lists them.")
    sys.argv = [f"oq2vl {name}", *sys.argv[2:]]
    runpy.run_module(found_name(COMMANDS[name][0]), run_name="__main__", alter_sys=True)


def found_name(module: str) -> str:
    """Returns the import name: convert/ is inside the package when installed, and beside it in a checkout."""
    inside = f"oq2vl_jax.{module}"
    is_inside = module.startswith("convert.") and importlib.util.find_spec("oq2vl_jax.convert") is not None
    return inside if is_inside else module


def bridge(name: str) -> ModuleType:
    """Imports a module of convert/, in an installation or a checkout."""
    return importlib.import_module(found_name(f"convert.{name}"))


def run() -> None:
    """The entry point of the console script."""
    run_command(main)


if __name__ == "__main__":
    run()
