"""python -m oq2vl_jax.train CONFIG [--optimizer.learning-rate 3e-4 ...]: trains, or resumes, one run."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from oq2vl_jax.bounds import CountOrZero, SmallCount
from oq2vl_jax.bounds import parse as parse_command
from oq2vl_jax.config import ModelConfig, TrainConfig
from oq2vl_jax.config_files import load_config, shipped_names
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.runtime import Processes, set_environment, start_processes

PROG = "python -m oq2vl_jax.train"


@dataclass(frozen=True)
class TrainCommand:
    """Trains an Open-Qwen2VL. CONFIG is a shipped configuration (tiny), a file of that kind or a resolved config.json;
    flags override its values. The same command with the same run_dir resumes from the last checkpoint."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved configuration, parameter counts and bytes per device, and exit."""
    distributed: bool = False
    """Run as one of several processes, set by Slurm or Open MPI or by the next three options."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    num_processes: SmallCount | None = None
    process_id: CountOrZero | None = None


def parse(args: list[str]) -> TrainCommand:
    """CONFIG comes first and supplies the defaults of all flags."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {PROG} CONFIG [OPTIONS]\n\n{TrainCommand.__doc__}\n")
        print(f"  {PROG} tiny --num-steps 20\n  {PROG} tiny --help     all options\n")
        print(f"Shipped: {', '.join(shipped_names())}")
        raise SystemExit(0 if args else 2)
    if args[0].startswith("-"):
        raise UserError(f"the first argument is the config file, got {args[0]!r}. Usage: {PROG} CONFIG [OPTIONS]")
    given = [value_of(flag, args) for flag in ("--init-from", "--run-dir")]
    default = TrainCommand(load_config(args[0], lambda config: adopted(config, *given)))
    return parse_command(TrainCommand, prog=f"{PROG} {args[0]}", args=args[1:], default=default)


def value_of(flag: str, args: list[str]) -> str | None:
    """Returns the value of a flag before tyro parses all of them; tyro takes _ for - in their names."""
    for argument, following in zip(args, [*args[1:], None], strict=True):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value or following
    return None


def adopted(config: TrainConfig, init_from: str | None, run_dir: str | None) -> ModelConfig:
    """Returns the model of a configuration that leaves it out; the two flags override it."""
    from oq2vl_jax.train.checks import model_of

    return model_of(init_from or config.init_from, run_dir or config.run_dir)


def main() -> None:
    command = parse(sys.argv[1:])
    set_environment()
    processes = Processes(command.coordinator, command.num_processes, command.process_id)
    if command.distributed or any(value is not None for value in processes):
        start_processes(processes)
    from oq2vl_jax.train.run import describe, run

    if command.dry_run:
        print(describe(command.config))
    else:
        run(command.config)


if __name__ == "__main__":
    run_command(main)
