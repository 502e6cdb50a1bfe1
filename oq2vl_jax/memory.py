"""Checks that the memory which a task is certain to need is available, before the task starts."""

import os
from pathlib import Path

from oq2vl_jax.errors import UserError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_fits(name: str, num_bytes: float, available: int, where: str, remedy: str) -> None:
    """Raises UserError if more is needed than available:
    "64 rows would take 900.0 GiB, and this machine has 23.4 GiB; take fewer."."""
    if num_bytes > available:
        raise UserError(f"{name} would take {gib(num_bytes)} GiB, and {where} has {gib(available)} GiB; {remedy}.")


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def host_bytes() -> int:
    """Returns the memory of this machine, or of the container that this process is in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        if Path(file).is_file() and (limit := Path(file).read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)
