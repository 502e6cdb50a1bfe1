"""What is set before jax starts: flags that exist, nothing of the user's overwritten, a cache that is found again."""

import os
import subprocess
import sys

import pytest

from oq2vl_jax import runtime
from oq2vl_jax.devices import DEVICES, device_of_kind, find_device
from oq2vl_jax.errors import UserError
from tests.xla_flags import FAST_COMPILING


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --xla_other=1")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    runtime.set_environment({"--xla_more": "2"})
    given, added = os.environ["XLA_FLAGS"].split()[:2], os.environ["XLA_FLAGS"].split()[2:]
    assert given == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_other=1"]
    assert "--xla_more=2" in added
    assert not any("latency_hiding" in flag for flag in added)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


def start_jax(flags):
    environment = os.environ | {"XLA_FLAGS": " ".join(f"{name}={value}" for name, value in flags.items())}
    return subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)


def test_every_flag_is_known_to_xla():
    assert start_jax(runtime.GPU_FLAGS | runtime.WITHOUT_TRITON_PRODUCTS).returncode == 0
    assert start_jax({"--xla_gpu_enable_async_collectives": "true"}).returncode != 0, "an unknown one ends the process"


def test_the_compilation_cache_lies_beside_the_runs(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XLA_FLAGS"] = FAST_COMPILING  # one device: less to compile
    command = [sys.executable, "-m", "oq2vl_jax.train", "configs/tiny.py", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--num-steps", "1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "compilation_cache").iterdir())


def test_devices_are_found_by_what_jax_calls_them():
    assert device_of_kind("NVIDIA H200") is DEVICES["h200"]
    assert device_of_kind("cpu") is None
    with pytest.raises(UserError, match="did you mean 'h100'"):
        find_device("h10")


@pytest.mark.parametrize(("address", "message"), [("localhost:1", "nobody answered"), ("localhost", "HOST:PORT")])
def test_a_first_process_that_is_not_there_is_one_sentence(address, message):
    with pytest.raises(UserError, match=message):
        runtime.wait_for_port(address, seconds=0.1)
