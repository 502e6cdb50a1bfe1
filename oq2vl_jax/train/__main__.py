"""python -m oq2vl_jax.train CONFIG [--optimizer.learning-rate 3e-4 ...]: trains, or resumes, one run."""

import os
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Annotated

import tyro

from oq2vl_jax.bounds import CountOrZero, SmallCount
from oq2vl_jax.bounds import parse as parse_command
from oq2vl_jax.command import bridge
from oq2vl_jax.config import ModelConfig, TrainConfig
from oq2vl_jax.config_files import load_config, shipped_names
from oq2vl_jax.errors import UserError, run_command, sentence_of
from oq2vl_jax.runtime import Processes, check_started_once, is_first_process, set_environment, start_processes

PROG = "python -m oq2vl_jax.train"


@dataclass(frozen=True)
class TrainCommand:
    """Trains an Open-Qwen2VL. CONFIG is a shipped configuration (tiny), a file of that kind or a resolved config.json;
    flags override its values. The same command with the same run_dir resumes from the last checkpoint."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved configuration, parameter counts and bytes per device, and exit."""
    push_to_hub: str | None = None
    """ORG/NAME on the Hugging Face hub, for an export of the finished run (convert.to_hf); extra convert."""
    private: bool = False
    """Make the repository private, if --push-to-hub makes it."""
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


def main() -> int:
    command = parse(sys.argv[1:])
    set_environment()
    processes = Processes(command.coordinator, command.num_processes, command.process_id)
    is_distributed = command.distributed or any(value is not None for value in processes)
    if is_distributed:
        start_processes(processes)
    else:
        check_started_once()
    from oq2vl_jax.train.run import describe, run
    from oq2vl_jax.train.watchdog import EXIT_CODE

    if command.private and command.push_to_hub is None:
        raise UserError("--private: makes a repository of --push-to-hub private; give both.")
    if command.dry_run:
        print(describe(command.config))
        return 0
    if command.push_to_hub is not None:
        check_can_push(command)
    digest = run_together(command.config) if is_distributed else run(command.config)
    if digest is None:  # schedulers take exit code 0 for a finished run
        return EXIT_CODE
    if command.push_to_hub is not None and is_first_process():
        push(command)
    return 0


def run_together(config: TrainConfig) -> str | None:
    """Runs one of several processes. If it fails it ends at once: jax's own end would wait minutes for the others."""
    from oq2vl_jax.train.run import run
    from oq2vl_jax.train.watchdog import BEAT_SECONDS

    try:
        return run(config)
    except Exception as error:
        sentence = sentence_of(error)
        code = 1 if sentence is None else 2
        if sentence is None:
            traceback.print_exc()
        else:
            print(f"error: {sentence}", file=sys.stderr)
        sys.stderr.flush()
        if is_first_process():  # the others, who end with its end, must read why first
            time.sleep(2 * BEAT_SECONDS)
        os._exit(code)


def check_can_push(command: TrainCommand) -> None:
    """Raises UserError, before anything is trained, if the finished run could not be pushed."""
    try:
        hub = bridge("hub")
        bridge("to_hf").check_imports()
    except ImportError as error:
        raise UserError(f"--push-to-hub: {error.name} is missing; pip install 'oq2vl-jax[convert]'.") from error
    bridge("export_config").check_has_export(command.config.model)
    if is_first_process():
        hub.check_can_push(str(command.push_to_hub))


def push(command: TrainCommand) -> None:
    """Exports the finished run into RUN_DIR/export-STEP, unless that is there, and pushes it."""
    from oq2vl_jax.train.remote_run_dir import local_run_dir

    config = command.config
    run_dir = local_run_dir(config.run_dir, config.checkpoint.staging_dir)
    out, to_hf = run_dir / f"export-{config.num_steps:06d}", bridge("to_hf")
    if not out.exists():
        print(to_hf.write_folder(to_hf.ToHFConfig(str(run_dir), str(out), push_to_hub=command.push_to_hub)))
    print(f"pushed to {bridge('hub').push(out, str(command.push_to_hub), command.private)}")


if __name__ == "__main__":
    run_command(main)
