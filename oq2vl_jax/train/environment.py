"""Records what a run depends on besides its configuration: RUN_DIR/environment.json, an entry for each time it began
or went on with something changed."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from oq2vl_jax.paths import write_text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers")
NAME = "environment.json"


def record_environment(run_dir: Path, step: int) -> None:
    """Appends {"from_step", "commit", "changes", "versions", "device", "num_devices", "num_cpus", ..} if it is new."""
    file = run_dir / NAME
    try:
        entries = json.loads(file.read_text())
        assert isinstance(entries, list)
    except (OSError, ValueError, AssertionError):  # none yet, or damaged: it decides nothing
        entries = []
    now = environment()
    if not entries or {name: value for name, value in entries[-1].items() if name != "from_step"} != now:
        write_text(str(file), json.dumps([*entries, {"from_step": step} | now], indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Returns the code, the versions and the devices of this process. changes: digest of uncommitted ones, or None."""
    commit, changes = code()
    return {
        "commit": commit,
        "changes": changes,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_cpus": num_cpus(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def num_cpus() -> int | None:
    """Returns the CPUs that this process may use; on a CPU their number decides in what order threads sum."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code() -> tuple[str | None, str | None]:
    """Returns the commit of the checkout and a digest of its uncommitted changes; (None, None) outside of one."""
    root = str(Path(__file__).parents[2])
    try:
        top, commit, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, timeout=20)
            for words in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("diff", "HEAD"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if commit.returncode or changes.returncode or not os.path.samefile(top.stdout.decode().strip(), root):
        return None, None  # no checkout, or installed inside another repository
    digest = hashlib.sha256(changes.stdout).hexdigest()[:16] if changes.stdout else None
    return commit.stdout.decode().strip(), digest
