"""Lists the GPUs this project plans for and measures on: peak rates, memory, links, and facts for XLA's compiler.

Peaks are the makers' dense bfloat16 rates with float32 accumulation, the denominator of MFU. Rates of
memory and links are bytes per second in one direction. Compiler facts are XLA's GpuTargetConfigProto; those of the
A100-40G and the H100 were read from machines, the others come from data sheets and the compute capability.
"""

from dataclasses import dataclass
from typing import NamedTuple

from oq2vl_jax.errors import UserError, hint


@dataclass(frozen=True)
class Device:
    """One GPU model."""

    name: str
    kind: str
    """As in jax.Device.device_kind."""
    peak_flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    """To another GPU of the node."""
    network_rate: float
    """To another node, per GPU."""
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    threads_per_core: int

    @property
    def usable_bytes(self) -> int:
        """Memory that JAX may take (runtime.set_environment); CUDA and its libraries need the remainder."""
        return int(USABLE_SHARE * self.memory_bytes)

    def target_config(self) -> str:
        """Returns the text form of XLA's GpuTargetConfigProto, for compiling without the device."""
        return TARGET_CONFIG.format(
            device=self, memory_rate=int(self.memory_rate), major=self.capability[0], minor=self.capability[1]
        )


class Rates(NamedTuple):
    """FLOPs and bytes per second, measured if a device is not in the table."""

    peak_flops: float
    memory_rate: float


USABLE_SHARE = 0.92
NODE_DEVICES = 8

TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {device.shared_bytes_per_core}
  threads_per_core_limit: {device.threads_per_core}
  core_count: {device.cores}
  fpus_per_core: {device.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_rate}
  l2_cache_size: {device.l2_bytes}
  clock_rate_ghz: {device.clock_ghz}
  device_memory_size: {device.memory_bytes}
  shared_memory_per_block_optin: {device.shared_bytes_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
device_description_str: "{device.kind}"
"""

AMPERE = {"shared_bytes_per_core": 167_936, "shared_bytes_per_block": 166_912, "threads_per_core": 2048}
HOPPER = {"shared_bytes_per_core": 233_472, "shared_bytes_per_block": 232_448, "threads_per_core": 2048}
ADA = {"shared_bytes_per_core": 102_400, "shared_bytes_per_block": 101_376, "threads_per_core": 1536}

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-40g", kind="NVIDIA A100-SXM4-40GB",
            peak_flops=312e12, memory_bytes=42_331_013_120,
            memory_rate=1555.2e9, link_rate=300e9, network_rate=25e9,
            capability=(8, 0), cores=108, fpus_per_core=64, clock_ghz=1.41,
            l2_bytes=41_943_040, **AMPERE,
        ),
        Device(
            name="a100-80g", kind="NVIDIA A100-SXM4-80GB",
            peak_flops=312e12, memory_bytes=84_987_740_160,
            memory_rate=2039e9, link_rate=300e9, network_rate=25e9,
            capability=(8, 0), cores=108, fpus_per_core=64, clock_ghz=1.41,
            l2_bytes=41_943_040, **AMPERE,
        ),
        Device(
            name="h100", kind="NVIDIA H100 80GB HBM3",
            peak_flops=989e12, memory_bytes=84_929_347_584,
            memory_rate=3352.3e9, link_rate=450e9, network_rate=50e9,
            capability=(9, 0), cores=132, fpus_per_core=128, clock_ghz=1.98,
            l2_bytes=52_428_800, **HOPPER,
        ),
        Device(
            name="h200", kind="NVIDIA H200",
            peak_flops=989e12, memory_bytes=150_121_545_728,
            memory_rate=4800e9, link_rate=450e9, network_rate=50e9,
            capability=(9, 0), cores=132, fpus_per_core=128, clock_ghz=1.98,
            l2_bytes=62_914_560, **HOPPER,
        ),
        Device(
            name="l40s", kind="NVIDIA L40S",
            peak_flops=362e12, memory_bytes=47_697_362_944,
            memory_rate=864e9, link_rate=32e9, network_rate=12.5e9,
            capability=(8, 9), cores=142, fpus_per_core=128, clock_ghz=2.52,
            l2_bytes=100_663_296, **ADA,
        ),
        Device(
            name="rtx-4090", kind="NVIDIA GeForce RTX 4090",
            peak_flops=165.2e12, memory_bytes=25_393_692_672,
            memory_rate=1008e9, link_rate=32e9, network_rate=3e9,
            capability=(8, 9), cores=128, fpus_per_core=128, clock_ghz=2.52,
            l2_bytes=75_497_472, **ADA,
        ),
    )
}  # fmt: skip
"""Links: NVLink 3 and 4, PCIe 4 x16. Networks: 200 and 400 Gb/s a GPU, 100 Gb/s for the L40S, 25 Gb/s for the 4090."""


def find_device(name: str) -> Device:
    """Returns the device of this name. Raises UserError if the table does not have it."""
    if name not in DEVICES:
        raise UserError(f"device {name!r} is not in the table ({', '.join(DEVICES)}){hint(name, DEVICES)}.")
    return DEVICES[name]


def device_of_kind(kind: str) -> Device | None:
    """Returns the device of a jax device_kind; None if the table does not have it."""
    return next((device for device in DEVICES.values() if device.kind == kind), None)
