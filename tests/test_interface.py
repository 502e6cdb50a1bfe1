"""The Python interface: what a model in memory says equals what the commands say; the notebook runs."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import oq2vl_jax
from convert.to_hf import ToHFConfig, export
from oq2vl_jax import interface
from oq2vl_jax.data.loading.batch import IGNORE
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.train.run import run
from tests.data.conftest import png
from tests.generate.conftest import checkpoint  # noqa: F401
from tests.train.conftest import tiny_config  # noqa: F401

LOSS_TOLERANCE = 2e-6  # relative, against numpy in float64; measured 1e-7
CHAT = [{"images": [png(seed=1)], "turns": ["what is it?", "a cat", "and now?", "a dog"]}, {"turns": ["hi", "hello"]}]


@pytest.fixture(scope="module")
def model(checkpoint):  # noqa: F811
    return oq2vl_jax.load(checkpoint)


def test_the_import_is_light():
    code = "import time; start = time.perf_counter(); import oq2vl_jax; print(time.perf_counter() - start)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(seconds) < 0.1  # measured 0.01


def test_ask_is_the_generator_s_answer(model, checkpoint):  # noqa: F811
    picture = png(seed=3)
    expected = Generator(checkpoint).ask("what is it?", [picture], SamplingOptions(max_new_tokens=8))
    assert model.ask([picture], "what is it?", max_new_tokens=8) == expected


def test_a_picture_is_a_path_bytes_an_array_or_an_image(model, tmp_path):
    picture = png(seed=3)
    (tmp_path / "a.png").write_bytes(picture)
    image = Image.open(io.BytesIO(picture))
    same = [str(tmp_path / "a.png"), tmp_path / "a.png", picture, image, np.asarray(image.convert("RGB"))]
    assert len({model.loss([{"images": [each], "turns": ["what?", "that"]}]) for each in same}) == 1


def test_the_loss_is_the_mean_over_labelled_tokens_of_all_samples(model):
    batch = oq2vl_jax.batch_of(CHAT, like=model)
    hidden = np.asarray(model.hidden(batch), np.float64)
    logits = hidden @ np.asarray(model.model.decoder.head, np.float64).T
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, places = np.nonzero(batch.labels != IGNORE)
    expected = -log_probabilities[rows, places, batch.labels[rows, places]].mean()
    assert model.loss(CHAT) == pytest.approx(expected, rel=LOSS_TOLERANCE)
    alone = [model.hidden([sample])[0] for sample in CHAT]
    for row, (whole, one) in enumerate(zip(hidden, alone, strict=True)):
        real = int((batch.segment_ids[row] > 0).sum())
        np.testing.assert_allclose(whole[:real], one[:real], atol=2e-5)  # measured 3e-6


def test_what_is_labelled_is_the_answers(model):
    batch = oq2vl_jax.batch_of(CHAT, like=model)
    labelled = model.codec.decode_exact([int(t) for t in batch.labels[0] if t != IGNORE])
    assert labelled == "a cat<|im_end|>a dog<|im_end|>"
    sample = Sample("k", [], conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])
    np.testing.assert_array_equal(
        oq2vl_jax.batch_of([sample], like=model).tokens[0], oq2vl_jax.batch_of([CHAT[1]], like=model).tokens[0]
    )


def test_an_export_and_a_run_are_loaded_alike(tiny_config, tmp_path):  # noqa: F811
    config = tiny_config(num_steps=2)
    run(config)
    export(ToHFConfig(config.run_dir, str(tmp_path / "exported"), dtype="float32"))
    samples = [{"images": [png()], "text": "a red circle"}]
    losses = {
        oq2vl_jax.load(path).loss(samples) for path in (config.run_dir, f"{config.run_dir}@2", tmp_path / "exported")
    }
    assert len(losses) == 1
    assert oq2vl_jax.load(config.run_dir, template="chatml").loss(CHAT) > 0
    with pytest.raises(UserError, match="an export has one set of weights"):
        oq2vl_jax.load(tmp_path / "exported", weights="ema")


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([], "batch_of: no samples"),
        ([{"image": "a.png", "text": "x"}], r"sample 0: expected .*images.*text"),
        ([{"images": [], "text": "x", "turns": []}], "sample 0: expected"),
        ([{"turns": ["hi", "hello"]}, {"images": ["none.png"], "turns": ["a", "b"]}], r"none\.png: cannot be read"),
        ([{"images": [np.zeros((2, 2))], "turns": ["a", "b"]}], r"an array uint8 \[height, width, 3\], got float64"),
        ([{"images": [7], "turns": ["a", "b"]}], "a PIL image, got int"),
        ([{"turns": ["hi", "<image>"]}], "sample 0: more_markers_than_images"),
        ([{"images": [b"no picture"], "turns": ["a", "b"]}], "sample 0: an image cannot be used"),
        ([{"images": ["none.png"], "turns": ["a", "b"]}], r"sample 0: none\.png: cannot be read"),
        ([{"text": 3}], "sample 0: expected"),
        ([{"turns": ["a", "b", "c"]}], "sample 0: the last of 3 turns is a question without an answer"),
        ([{"turns": ["a", 2]}], "sample 0: expected"),
        ([{"images": None, "turns": ["a", "b"]}], "sample 0: images are a list of pictures, got NoneType"),
    ],
)
def test_samples_that_cannot_be_used_are_one_sentence(samples, sentence, model):
    with pytest.raises(UserError, match=sentence):
        oq2vl_jax.batch_of(samples, like=model)


def test_a_path_that_is_nothing_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint here"):
        oq2vl_jax.load(tmp_path)


@pytest.mark.parametrize("options", [{"weights": "emma"}, {"template": "chat"}])
def test_an_option_that_there_is_not_is_one_sentence(options, checkpoint):  # noqa: F811
    with pytest.raises(UserError, match=r"load: .* is '.*', expected one of"):
        oq2vl_jax.load(checkpoint, **options)


def test_ask_takes_the_model_that_is_there_now(checkpoint):  # noqa: F811
    loaded = oq2vl_jax.load(checkpoint)
    before = loaded.ask([], "what is it?", max_new_tokens=8)
    loaded.model = jax.tree.map(lambda x: -x, loaded.model)
    assert loaded.ask([], "what is it?", max_new_tokens=8) != before
    with pytest.raises(UserError, match="images are a list of pictures, got str"):
        loaded.ask("cat.jpg", "what?")
    with pytest.raises(UserError, match="an image cannot be used"):
        loaded.ask([b"no picture"], "what?")


def test_a_pil_image_keeps_its_orientation_and_may_have_any_mode():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    again = Image.open(io.BytesIO(interface.bytes_of(Image.open(io.BytesIO(file.getvalue())))))
    assert again.getexif()[0x0112] == 6
    assert Image.open(io.BytesIO(interface.bytes_of(Image.new("CMYK", (4, 2))))).mode == "RGB"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in their order, as a kernel would, in an empty folder; the printed losses fall."""
    cells = json.loads(Path("docs/examples/tour.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tour"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
    losses = [json.loads(line)["loss"] for line in Path("runs/tour/metrics.jsonl").read_text().splitlines()]
    assert losses == sorted(losses, reverse=True)
