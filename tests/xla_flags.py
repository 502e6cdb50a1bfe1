"""Flags of XLA by which programs of the tests compile fast, here and in the commands that tests start.

Compiling is most of the suite's time: without LLVM's optimizations the train step takes 2.6 s instead of 4.5, without
XLA's fusion emitters 0.9 s. jaxlib 0.11 has no other way to compile, and does not know that flag.
"""

from importlib.metadata import version

FAST_COMPILING = "--xla_backend_optimization_level=0"
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) <= (0, 10):  # an unknown flag would end the process
    FAST_COMPILING += " --xla_cpu_use_fusion_emitters=false"


def devices(number: int) -> str:
    """XLA_FLAGS of a CPU that looks like so many devices."""
    return f"--xla_force_host_platform_device_count={number} {FAST_COMPILING}"
