"""Cached, batched decoding against the plain forward pass, one prompt at a time."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.decoding import generate_greedy
from oq2vl_jax.generate import GenerateConfig, Generator, answer_requests, cut_at, read_images, read_requests
from oq2vl_jax.train.run import run
from tests.data.conftest import png
from tests.train.conftest import TINY, tiny_model

STOP = 258
NEW_TOKENS = 7


@pytest.fixture(scope="module")
def prompts():
    """Five prompts of different lengths, with 0, 1 or 2 images of 4 placeholders."""
    rng = np.random.default_rng(0)
    rows = []
    for length, num_images in ((3, 0), (9, 1), (14, 2), (5, 1), (11, 0)):
        tokens = np.concatenate([np.full(4 * num_images, 268), rng.integers(0, 256, length)])
        images = np.zeros((2, 32, 32, 3), np.uint8)
        images[:num_images] = rng.integers(0, 256, (num_images, 32, 32, 3))
        rows.append((tokens, images))
    return rows


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, rows, padded_length, stop=STOP):
    tokens = np.zeros((len(rows), padded_length), np.int32)
    for row, (prompt, _) in enumerate(rows):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt, _ in rows])
    return np.asarray(generate_greedy(model, tokens, lengths, np.stack([i for _, i in rows]), NEW_TOKENS, stop))


@jax.jit
def plain_logits(model, tokens, images, segments):
    positions = jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, images, segments, positions))[0]


def generate_without_cache(model, prompt, images):
    """One whole forward pass per new token; positions after the last token are padding of segment 0."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + NEW_TOKENS):
        segments = (np.arange(40) < length).astype(np.int32)[None]
        tokens[0, length] = plain_logits(model, tokens, images[None], segments)[length - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + NEW_TOKENS]


def test_cached_batched_decoding_equals_the_plain_forward_pass_one_by_one(model, prompts):
    together = generate(model, prompts, 24, stop=-1)
    for row, (prompt, images) in enumerate(prompts):
        assert together[row].tolist() == generate_without_cache(model, prompt, images).tolist()


def test_padding_changes_nothing(model, prompts):
    for row in prompts:
        assert generate(model, [row], len(row[0])).tolist() == generate(model, [row], 40).tolist()


def test_everything_after_the_stop_token_is_the_stop_token(model, prompts):
    free = generate(model, prompts, 24, stop=-1)
    stop = int(free[0, 2])
    stopped = generate(model, prompts, 24, stop=stop)
    for before, after in zip(free.tolist(), stopped.tolist(), strict=True):
        kept = before.index(stop) if stop in before else NEW_TOKENS
        assert after == before[:kept] + [stop] * (NEW_TOKENS - kept)


def test_cut_at_drops_the_stop_token_and_what_follows():
    assert cut_at([5, 6, 2, 2], 2) == [5, 6]
    assert cut_at([5, 6], 2) == [5, 6]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and pictures to ask it about."""
    root = tmp_path_factory.mktemp("trained")
    run(dataclasses.replace(TINY, run_dir=str(root / "run"), num_steps=2))
    for i in range(3):
        (root / f"{i}.png").write_bytes(png(seed=i))
    return root


def test_a_checkpoint_answers_requests_in_the_order_of_the_file(trained):
    lines = [{"image": f"{i % 3}.png", "prompt": "a" * (1 + 5 * (i % 4)), "id": i} for i in range(7)]
    file = trained / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests = read_requests(str(file))
    generator = Generator(str(trained / "run"))
    config = GenerateConfig(str(trained / "run"), max_new_tokens=4, batch_size=4)
    answered = dict(answer_requests(generator, requests, config))
    assert sorted(answered) == list(range(7))
    for i, prediction in answered.items():
        assert prediction["id"] == i
        prompt = generator.encode_prompt(lines[i]["prompt"], 1)
        assert prediction["reply"] == generator.reply([prompt], [read_images(requests[i]["image"])], 4)[0]


def test_the_command_prints_a_reply(trained):
    command = [sys.executable, "-m", "oq2vl_jax.generate", "--checkpoint", str(trained / "run")]
    command += ["--image", str(trained / "0.png"), "--prompt", "a", "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_requests_are_checked_before_anything_runs(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"image": "no.png", "prompt": "x"}\n{"prompt": "x"}\nnot json\n')
    with pytest.raises(UserError, match=r"line 1: no image .*no\.png; line 2: KeyError: 'image'; line 3.*3 problems"):
        read_requests(str(file))
    with pytest.raises(UserError, match="no such file"):
        read_requests(str(Path("nowhere.jsonl")))


def test_a_prompt_with_an_image_marker_is_refused(trained):
    with pytest.raises(UserError, match="images are put before the prompt"):
        Generator(str(trained / "run")).encode_prompt("<image> what?", 1)


def test_an_image_that_does_not_decode_is_one_sentence(trained):
    (trained / "broken.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "oq2vl_jax.generate", "--checkpoint", str(trained / "run")]
    done = subprocess.run(
        [*command, "--image", str(trained / "broken.png"), "--prompt", "a"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "image_undecodable" in done.stderr
    assert "Traceback" not in done.stderr


def test_generation_is_the_same_on_every_number_of_devices(model, prompts):
    from oq2vl_jax.config import MeshConfig
    from oq2vl_jax.train.sharding import make_mesh, parameter_shardings

    sharded = jax.device_put(model, parameter_shardings(model, make_mesh(MeshConfig(1, 8))))
    assert generate(sharded, prompts, 24).tolist() == generate(model, prompts, 24).tolist()
