"""An export goes to the hub and is asked from there, against a stand-in of the hub; what goes wrong is a sentence."""

import json
import os
import subprocess
import sys

import pytest

from convert import from_hf
from tests.convert.hub_stand_in import TOKEN, stand_in


@pytest.fixture
def hub(tmp_path):
    with stand_in() as server:
        server.environment = os.environ | {
            "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def checkpoint(llava, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("hub") / "checkpoint")
    from_hf.convert(from_hf.FromHFConfig(out, model=str(llava[0]), template="plain"))
    return out


def run_module(hub, module, *words, **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, env=hub.environment | environment
    )


def test_a_model_goes_to_the_hub_and_answers_from_there(hub, checkpoint, tmp_path):
    results = {"emoji": {"accuracy": 0.731, "interval_95": [0.7, 0.76], "num_units": 1000, "method": "options"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = str(tmp_path / "out")
    hub.files["me/tiny"] = {
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"old",
        "a.txt": b"a",
    }
    pushed = run_module(
        hub, "convert.to_hf", checkpoint, "--out", out, "--push-to-hub", "me/tiny", "--private", "--results",
        str(tmp_path), "--dtype", "float32",
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    assert f"pushed to {hub.url}/me/tiny" in pushed.stdout
    assert hub.private == {"me/tiny"}
    files = hub.files["me/tiny"]
    assert {"config.json", "README.md", "model.safetensors", "tokenizer.json", "a.txt"} <= set(files)
    assert not {"model.safetensors.index.json", "model-00001-of-00002.safetensors"} & set(files)  # of an earlier export
    card = files["README.md"].decode()
    assert "| emoji | 73.1 | 70.0 to 76.0 | 1,000 | options |" in card
    assert "vllm serve me/tiny" in card
    assert 'folder = "me/tiny"' in card
    everything = pushed.stdout + pushed.stderr + "".join(str(content) for content in files.values())
    assert TOKEN not in everything
    words = ("--prompt", "what is it?", "--max-new-tokens", "4")
    here = run_module(hub, "oq2vl_jax.generate", "--checkpoint", out, *words)
    there = run_module(hub, "oq2vl_jax.generate", "--checkpoint", "me/tiny", *words)
    assert there.returncode == here.returncode == 0, there.stderr
    assert there.stdout == here.stdout


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (401, "the hub does not accept the token: set HF_TOKEN"),
        (403, "the token may not do that"),
        (404, "the hub knows no such repository"),
        (503, "the hub answers 503"),
        ("drop", "the hub cannot be reached, or the line dropped"),
    ],
)
def test_a_hub_that_fails_is_a_sentence_and_nothing_is_half_written(
    hub, checkpoint, tmp_path, failing, message, monkeypatch
):
    from convert.hub import check_can_push
    from oq2vl_jax.errors import UserError

    hub.failing = failing
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    use_stand_in(hub, monkeypatch)
    with pytest.raises(UserError, match=message):
        check_can_push("me/tiny")
    with pytest.raises(UserError, match=message):
        from_hf.local_folder("me/tiny")


def use_stand_in(hub, monkeypatch):
    """huggingface_hub reads its environment when it is imported."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi.__init__, "__defaults__", HfApi.__init__.__defaults__)


def test_a_push_that_fails_leaves_a_whole_folder_and_says_how_to_go_on(hub, checkpoint, tmp_path):
    hub.failing, hub.fails_from = 403, "/api/models/"
    out = str(tmp_path / "out")
    failed = run_module(hub, "convert.to_hf", checkpoint, "--out", out, "--push-to-hub", "me/tiny")
    assert failed.returncode == 2
    assert f"{out} is whole, but was not pushed to me/tiny: the token may not do that" in failed.stderr
    assert f"then: hf upload me/tiny {out}" in failed.stderr
    assert os.path.isfile(os.path.join(out, "model.safetensors"))


def test_a_slip_in_a_folder_that_is_here_is_no_repository(tmp_path, monkeypatch):
    from oq2vl_jax.generate.loading import is_export

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not is_export("runs/sft_lava")
    assert is_export("someone/sft_llava")


def test_results_of_another_checkpoint_are_refused(checkpoint, tmp_path):
    from convert import to_hf
    from oq2vl_jax.errors import UserError

    (tmp_path / "results.json").write_text(json.dumps({"emoji": {"checkpoint_identity": "of another"}}))
    with pytest.raises(UserError, match="emoji is of another checkpoint than this one"):
        to_hf.export(to_hf.ToHFConfig(checkpoint, str(tmp_path / "out"), results=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_written(hub, checkpoint, tmp_path):
    out = str(tmp_path / "out")
    failed = run_module(hub, "convert.to_hf", checkpoint, "--out", out, "--push-to-hub", "me/tiny", HF_TOKEN="")
    assert failed.returncode == 2
    assert "there is no token: set HF_TOKEN" in failed.stderr
    assert not os.path.exists(out)


@pytest.mark.parametrize("name", ["tiny", "me/", "../me/tiny", "me/tiny/more"])
def test_a_name_that_is_no_repository_is_refused(name):
    from convert.hub import check_can_push
    from oq2vl_jax.errors import UserError

    with pytest.raises(UserError, match="expected ORG/NAME"):
        check_can_push(name)
