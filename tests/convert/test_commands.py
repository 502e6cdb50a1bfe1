"""The commands of the bridge: exit codes, folders in the way, kills, full disks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert import from_hf, to_hf
from oq2vl_jax.config_files import load_config
from oq2vl_jax.errors import UserError


def test_a_folder_in_the_way_is_left_alone(siglip, qwen, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for convert, config in (
        (from_hf.convert, from_hf.FromHFConfig(str(tmp_path / "out"), str(siglip[0]), str(qwen[0]))),
        (to_hf.export, to_hf.ToHFConfig("nowhere", str(tmp_path / "out"))),
    ):
        with pytest.raises(UserError, match="a folder that is not empty"):
            convert(config)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert.from_hf", "--out", "o"], "give either --vision and --decoder, or --model"),
        (["convert.from_hf", "--model", "no/such/folder", "--out", "o"], "no/such/folder: no such folder"),
        (["convert.from_hf", "--vison", "v", "--out", "o"], "--vision"),
        (["convert.to_hf", "nowhere", "--out", "o"], "nowhere: no whole checkpoint here"),
        (["convert.to_prismatic", "nowhere", "--out", "o"], "nowhere: no whole checkpoint here"),
        (["convert.from_prismatic", "nowhere", "--out", "o"], "no such file"),
        (["convert.ask_hf", "nowhere", "--prompt", "p"], "nowhere: no config.json there"),
    ],
)
def test_commands_exit_with_2_and_one_sentence(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("o").exists()


KILLED = {
    "convert.from_hf": lambda parts, _: ["--vision", str(parts[0]), "--decoder", str(parts[1])],
    "convert.to_hf": lambda _, checkpoint: [str(checkpoint)],
}


@pytest.mark.parametrize("command", KILLED)
def test_killed_half_way_leaves_nothing_that_looks_finished(parts, tmp_path, command):
    """Killed as soon as it has begun to write; the same command then goes through."""
    checkpoint, out = tmp_path / "weights", tmp_path / "result" / "out"
    from_hf.convert(from_hf.FromHFConfig(str(checkpoint), str(parts[0]), str(parts[1]), visual_tokens=4))
    arguments = [sys.executable, "-m", command, *KILLED[command](parts, checkpoint), "--out", str(out)]
    arguments += ["--visual-tokens", "4"] if command == "convert.from_hf" else []
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if out.parent.exists() and any(path.is_file() for path in out.parent.rglob("*")):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out.partial"]
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_full_disk_is_one_sentence_and_nothing_is_left(parts, tmp_path, monkeypatch):
    from convert import tensor_files

    out = tmp_path / "result" / "out"
    checkpoint = tmp_path / "weights"
    from_hf.convert(from_hf.FromHFConfig(str(checkpoint), str(parts[0]), str(parts[1]), visual_tokens=4))

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files.SafetensorsWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        to_hf.export(to_hf.ToHFConfig(str(checkpoint), str(out)))
    assert not list(out.parent.iterdir())


def test_the_decoder_of_the_demo_needs_no_folder_of_its_own():
    """Sizes whose heads fill the width export without head_dim, which not every reader of Qwen2 knows."""
    from convert.export_config import to_llava_config
    from oq2vl_jax.data.text.templates import SpecialTokens

    model = load_config("configs/easy_vqa_tune.py").model
    values = to_llava_config(model, "plain", "bfloat16", SpecialTokens(*range(6)))
    assert "head_dim" not in values["text_config"]
    assert np.isclose(values["text_config"]["rope_parameters"]["rope_theta"], 1e4)


@pytest.mark.parametrize("flag", [("--visual-tokens", "4"), ("--activation", "gelu"), ("--seed", "1")])
def test_settings_of_the_parts_are_refused_with_a_whole_model(tmp_path, monkeypatch, flag):
    monkeypatch.setattr("sys.argv", ["from_hf", "--out", str(tmp_path / "out"), "--model", str(tmp_path), *flag])
    with pytest.raises(UserError, match=f"{flag[0]} with --model: its own configuration and projector decide"):
        from_hf.main()
