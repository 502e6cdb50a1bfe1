"""The command oq2vl_jax.generate."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator, bucket
from oq2vl_jax.generate.options import GenerateConfig, check
from oq2vl_jax.generate.reply import ReplyText, SamplingOptions
from oq2vl_jax.generate.requests import answer_requests, read_images, read_requests, write_predictions
from tests.data.conftest import png


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "oq2vl_jax.generate", *arguments], capture_output=True, text=True)


@pytest.fixture
def pictures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(seed=i))
    return tmp_path


def test_a_checkpoint_answers_requests_in_the_order_of_the_file(checkpoint, pictures):
    lines = [{"image": f"{i % 3}.png", "prompt": "a" * (1 + 5 * (i % 4)), "id": i} for i in range(6)]
    lines.append({"prompt": "no picture", "id": 6})
    file = pictures / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests = read_requests(str(file))
    generator = Generator(checkpoint)
    answered = dict(answer_requests(generator, requests, SamplingOptions(4), batch_size=4))
    assert sorted(answered) == list(range(7))
    for i, prediction in answered.items():
        assert prediction["id"] == i
        images = read_images(requests[i]["image"])
        assert prediction["reply"] == generator.ask(lines[i]["prompt"], images, SamplingOptions(4))


def test_the_command_prints_the_reply_it_streams(checkpoint, pictures):
    image = str(pictures / "0.png")
    done = run_command("--checkpoint", checkpoint, "--image", image, "--prompt", "ab", "--max-new-tokens", "9")
    assert done.returncode == 0, done.stderr
    expected = Generator(checkpoint).ask("ab", read_images([image]), SamplingOptions(9))
    assert done.stdout.strip() == expected


def test_requests_are_checked_before_anything_runs(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"image": "no.png", "prompt": "x"}\n{"image": "no.png"}\nnot json\n')
    with pytest.raises(
        UserError, match=r"line 1: no image .*no\.png; line 2 is no JSON object with a text prompt.*; line 3"
    ):
        read_requests(str(file))
    with pytest.raises(UserError, match="no such file"):
        read_requests(str(Path("nowhere.jsonl")))


def test_empty_lines_null_images_and_a_byte_order_mark_are_taken(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b", "image": null}\n')
    assert [request["prompt"] for request in read_requests(str(file))] == ["a", "b"]


def test_an_interrupted_file_of_requests_is_gone_on_with(checkpoint, tmp_path, monkeypatch, capsys):
    requests = [{"prompt": "abc"[: 1 + i % 3] * 20 * (1 + i % 2), "image": []} for i in range(8)]
    options, generator = SamplingOptions(3), Generator(checkpoint)
    whole = GenerateConfig(checkpoint, requests="r", out=str(tmp_path / "whole.jsonl"), batch_size=2)
    write_predictions(generator, requests, options, whole)
    real, calls = generator.generate, []

    def cut_off(some, options):
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(some, options)

    config = dataclasses.replace(whole, out=str(tmp_path / "out.jsonl"))
    monkeypatch.setattr(generator, "generate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(generator, requests, options, config)
    with (tmp_path / "out.jsonl.partial").open("a") as stream:
        stream.write('{"number": 7, "predi')  # as a kill leaves it
    write_predictions(generator, requests, options, config)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(calls) == 3 + 2  # two batches of four were there
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert "4 of 8 were answered before" in capsys.readouterr().err


def test_a_prompt_with_an_image_marker_is_refused(checkpoint):
    with pytest.raises(UserError, match="images are put before the prompt"):
        Generator(checkpoint).encode_prompt("<image> what?", 1)


def test_an_image_that_does_not_decode_is_one_sentence(checkpoint, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    done = run_command("--checkpoint", checkpoint, "--image", str(tmp_path / "broken.png"), "--prompt", "a")
    assert done.returncode == 2
    assert "it is damaged or none of" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be"),
        ({"stop": ("",)}, "a stop text is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 to"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options)


def test_a_prompt_that_is_no_utf8_is_refused():
    with pytest.raises(UserError, match="--prompt is no UTF-8"):
        check(GenerateConfig("c", prompt="caf\udce9?"))
    with pytest.raises(UserError, match="--stop is no UTF-8"):
        check(GenerateConfig("c", prompt="x", stop=("\udce9",)))


def test_a_reply_is_the_same_by_the_token_and_at_once(byte_tokenizer_folder):
    """Text, stops and pieces against one decoding of everything, on random tokens with broken characters."""
    codec, rng = TextCodec.from_transformers(byte_tokenizer_folder), random.Random(0)
    for _ in range(300):
        tokens = codec.encode("".join(rng.choices(("ab", "é", "你", "🙂", " ", "\n", "stop", "xy"), k=12)))
        tokens = [t for t in tokens if rng.random() > 0.05]
        stops = tuple(rng.sample(("stop", "b ", "\n", "yé", "🙂a"), k=rng.randrange(4)))
        options = SamplingOptions(rng.randrange(1, 40), stop=stops)
        text = ReplyText(codec, set(), options)
        shown, rest = "", list(tokens)
        while rest and not text.is_done:
            n = rng.randrange(1, 5)
            text.add(rest[:n])
            rest, shown = rest[n:], shown + text.new_piece()
        ends = [n for n in range(1, len(tokens) + 1) if any(stop in codec.decode(tokens[:n]) for stop in stops)]
        num_tokens = min([*ends[:1], options.max_new_tokens, len(tokens)])
        expected = codec.decode(tokens[:num_tokens])
        places = [place for stop in stops if (place := expected.find(stop)) >= 0]
        assert text.text == (expected[: min(places)] if places else expected)
        assert text.tokens == tokens[:num_tokens]
        if text.is_done:
            assert shown == text.text


def test_buckets_are_few_and_waste_a_quarter_at_most():
    lengths = range(1, 4097)
    assert len({bucket(length) for length in lengths}) <= 24
    assert all(length <= bucket(length) <= max(32, 1.25 * length + 32) for length in lengths)


def test_the_command_has_the_sampling_options_with_their_types_and_defaults():
    """generate/options.py repeats them, as the command's checks name flags and importing the others takes a second."""
    command = {field.name: (field.type, field.default) for field in dataclasses.fields(GenerateConfig)}
    for field in dataclasses.fields(SamplingOptions):
        assert command[field.name] == (field.type, field.default)
