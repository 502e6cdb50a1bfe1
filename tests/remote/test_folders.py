"""Requests, pictures and benchmarks at remote addresses."""

import io
import json

import fsspec
import pytest
from PIL import Image

from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.tables import find_files
from oq2vl_jax.generate.requests import read_images, read_requests
from oq2vl_jax.remote.folders import local_copy


@pytest.fixture
def memory(monkeypatch, tmp_path):
    monkeypatch.setenv("OQ2VL_JAX_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def test_requests_name_pictures_beside_them_and_elsewhere(memory, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    memory.pipe_file("/in/a.png", buffer.getvalue())
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    lines = [{"prompt": "what?", "image": "a.png"}, {"prompt": "and?", "image": f"file://{tmp_path}/b.png"}]
    memory.pipe_file("/in/requests.jsonl", "\r\n".join(map(json.dumps, lines)).encode())
    first, second = read_requests("memory://in/requests.jsonl")
    assert first["image"] == ["memory://in/a.png"]
    assert read_images([*first["image"], *second["image"]]) == [buffer.getvalue()] * 2
    memory.pipe_file("/in/requests.jsonl", json.dumps({"prompt": "what?", "image": "none.png"}).encode())
    with pytest.raises(UserError, match=r"line 1: no image memory://in/none\.png"):
        read_requests("memory://in/requests.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_requests("memory://in/none.jsonl")


def test_benchmarks_are_copied_once_and_again_when_they_change(memory):
    memory.pipe_file("/data/mmbench/MMBench_DEV_EN.tsv", b"index\n1\n")
    (file,) = find_files("memory://data", "mmbench", ["MMBench_DEV_EN*.tsv"])
    assert file.read_bytes() == b"index\n1\n"
    assert local_copy("memory://data") == file.parents[1]
    memory.pipe_file("/data/mmbench/MMBench_DEV_EN.tsv", b"index\n1\n2\n")
    assert local_copy("memory://data") != file.parents[1]
    with pytest.raises(UserError, match="no such folder"):
        find_files("memory://nothing", "mmbench", ["*.tsv"])
