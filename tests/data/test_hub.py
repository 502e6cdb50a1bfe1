"""Parquet files of the hub, read through huggingface_hub's filesystem from a local stand-in of it."""

import os
import subprocess
import sys

from tests.data.hub import hub
from tests.data.test_parquet import pack, write_parquet


def pack_from_hub(endpoint, pattern, out, tokenizer):
    command = [sys.executable, "-m", "oq2vl_jax.data.pack", "--shards", pattern, "--out", str(out), "--tokenizer",
               tokenizer, "--num-tokens", "192", "--max-images", "4", "--visual-tokens", "4", "--template", "chatml",
               "--num-workers", "1"]  # fmt: skip
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_files_of_the_hub_pack_to_the_rows_of_local_ones(tmp_path, byte_tokenizer_folder):
    (tmp_path / "local").mkdir()
    path = write_parquet(tmp_path / "local", "conversations")
    (tmp_path / "served").mkdir()
    os.rename(path, tmp_path / "served" / "data.parquet")
    pack(str(tmp_path / "served" / "data.parquet"), tmp_path / "local", byte_tokenizer_folder)
    with hub(tmp_path / "served", "org/name") as (endpoint, asked):
        pattern = "hf://datasets/org/name/*.parquet"
        done = pack_from_hub(endpoint, pattern, tmp_path / "remote", byte_tokenizer_folder)
        assert done.returncode == 0, done.stderr
        assert any("resolve" in path for path in asked)
        missing = pack_from_hub(endpoint, "hf://datasets/org/other/*.parquet", tmp_path / "no", byte_tokenizer_folder)
        assert missing.returncode == 2
        assert "Traceback" not in missing.stderr
    rows = [sorted((tmp_path / name).rglob("rows-*.array_record")) for name in ("local", "remote")]
    assert [file.read_bytes() for file in rows[0]] == [file.read_bytes() for file in rows[1]]
    assert len(rows[0]) == 4
