"""Configures jax before it starts, and joins several processes into one run. Imports jax lazily.

XLA flags go through an environment variable that jax reads once, when its backend starts. An unknown flag ends the
process, so there is one table of flags, and a test that starts jax with it.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.devices import USABLE_SHARE
from oq2vl_jax.errors import UserError

GPU_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    "--xla_gpu_dot_merger_threshold_mb": "0",
}
"""Known to jax 0.10 and 0.11. Scheduler: collectives overlap with computation; without it jax 0.11 compiled them one
after the other. Merger at 0: XLA would merge the encoder's q, k, v into one product, then write each again with its
bias."""
WITHOUT_TRITON_PRODUCTS = {"--xla_gpu_enable_triton_gemm": "false"}
"""Triton's matrix products are tuned by running them. bench plan compiles without the device, and exact float32
products of bench report's part b took more than four minutes to tune on an H200."""


CONNECT_SECONDS = 120.0
"""Seconds that a process waits for process 0."""


class Processes(NamedTuple):
    """The place of this process in a run. coordinator: HOST:PORT of process 0. All None: taken from the scheduler."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def set_environment(flags: dict[str, str] | None = None) -> None:
    """Adds XLA flags (GPU_FLAGS) and the share of memory that JAX takes; values set by the user are kept."""
    user_flags = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in user_flags}
    added = [f"{name}={value}" for name, value in (GPU_FLAGS | (flags or {})).items() if name not in names]
    os.environ["XLA_FLAGS"] = " ".join([*user_flags, *added])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(USABLE_SHARE))


def use_compilation_cache(folder: Path) -> None:
    """Caches programs in folder/compilation_cache, so that a restart does not compile; keeps a folder set before."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str((folder / "compilation_cache").absolute()))


LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "LOCAL_WORLD_SIZE": "torchrun"}
"""Variables in which launchers say how many processes they started."""


def check_started_once() -> None:
    """Raises UserError if a launcher started several processes that do not know of each other: each would train all."""
    for name, launcher in LAUNCHERS.items():
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            how = "add --distributed" if launcher != "torchrun" else "start it without torchrun"
            raise UserError(
                f"{launcher} started {count} tasks of this command, and each would train the whole run; {how}, or "
                "start one: a process uses all GPUs that it sees."
            )


def start_processes(processes: Processes) -> None:
    """Joins the processes of a run. Raises UserError if the options do not fit together or nobody answers."""
    import jax

    is_given = [value is not None for value in processes]
    if any(is_given) and not all(is_given):
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all three.")
    if processes.coordinator and processes.coordinator.rpartition(":")[0] == "":
        raise UserError(f"--coordinator = {processes.coordinator!r}, expected HOST:PORT.")
    if all(is_given) and not 0 <= (processes.index or 0) < (processes.count or 0):
        raise UserError(f"--process-id = {processes.index} is not one of --num-processes = {processes.count}.")
    if processes.index:  # jax ends the process if it does not find process 0 in time
        wait_for_port(processes.coordinator or "", CONNECT_SECONDS)
    try:
        jax.distributed.initialize(processes.coordinator, processes.count, processes.index)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes did not come together ({str(error).splitlines()[0]}); outside of Slurm and Open MPI, name "
            "--coordinator HOST:PORT --num-processes N --process-id I."
        ) from error


def wait_for_port(address: str, seconds: float) -> None:
    """Returns once somebody listens at HOST:PORT. Raises UserError when nobody does in time."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise UserError(f"--coordinator = {address!r}, expected HOST:PORT.")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator {address}: nobody answered for {seconds:.0f} s ({error}); is the process with "
                    "--process-id 0 running there?"
                ) from error
            time.sleep(0.2)


def is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def wait_long(name: str, seconds: float) -> None:
    """Returns when every process has called it with this name. Collectives wait half a minute at most on CPUs; this is
    jax's own barrier, which it does not show in public."""
    import jax

    if jax.process_count() > 1:
        from jax._src import distributed

        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"oq2vl_jax {name}", int(1000 * seconds))


def any_process(answer: bool) -> bool:
    """Returns True in every process if `answer` is True in one."""
    import jax

    if jax.process_count() == 1:
        return answer
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array([answer]))))


def whole_array(array: Any) -> Any:
    """Returns a whole global array as a numpy array, in every process."""
    import jax

    if getattr(array, "is_fully_addressable", True):
        return jax.device_get(array)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array, tiled=True)
