"""What fits: memory that something certain to be needed takes, compared with what is there before it is tried."""

import os
from pathlib import Path

from oq2vl_jax.errors import UserError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_fits(what: str, num_bytes: float, available: int, where: str, remedy: str) -> None:
    """Raises UserError, as in "64 rows would take 900.0 GiB, and this machine has 23.4 GiB; take fewer."."""
    if num_bytes > available:
        raise UserError(f"{what} would take {gib(num_bytes)} GiB, and {where} has {gib(available)} GiB; {remedy}.")


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def host_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        if Path(file).is_file() and (limit := Path(file).read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)
