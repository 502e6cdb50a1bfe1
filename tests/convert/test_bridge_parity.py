"""Logits through the bridge against torch: Hugging Face parts, the published forward pass, the exported model.

Random tiny models in float32. Errors are relative to the largest logit; what was measured stands beside each tolerance.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from convert import from_hf, from_prismatic, to_hf
from oq2vl_jax.checkpoint import find_checkpoint, load_description
from oq2vl_jax.config import MeshConfig
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.loading import load_model
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.generate.requests import read_images
from oq2vl_jax.model.siglip import normalize
from oq2vl_jax.sharding import make_mesh
from tests.convert.conftest import IMAGE_SIZE, IMAGE_TOKEN, NUM_PATCHES
from tests.convert.published_forward import published_logits, round_rotary
from tests.convert.test_round_trips import write_prismatic_run

TOLERANCE = 2e-5  # of the largest logit; measured 3.3e-7 to 5.7e-7, printed by every test
PIXEL_TOLERANCE = 1 / 255  # of a range of 2; measured 1.2e-7
NUM_IMAGES = (0, 1, 2)


def random_row(num_images, num_visual_tokens, length=11, seed=0):
    """Token ids with runs of placeholders, and pixels as uint8 [I, height, width, 3]."""
    rng = np.random.default_rng(seed + num_images)
    text = [rng.integers(0, 256, length) for _ in range(num_images + 1)]
    tokens = text[0]
    for piece in text[1:]:
        tokens = np.concatenate([tokens, np.full(num_visual_tokens, IMAGE_TOKEN), piece])
    return tokens, rng.integers(0, 256, (num_images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def our_logits(checkpoint, tokens, images):
    model = load_model(find_checkpoint(str(checkpoint)), make_mesh(MeshConfig()))
    ones, positions = np.ones_like(tokens)[None], np.arange(len(tokens))[None]
    hidden = model(jnp.asarray(tokens[None]), jnp.asarray(images[None]), jnp.asarray(ones), jnp.asarray(positions))
    return np.asarray(model.logits(hidden)[0])


def torch_pixels(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def check_equal(name, ours, theirs):
    theirs = theirs.detach().numpy()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: relative error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("visual_tokens", [4, NUM_PATCHES])
def test_siglip_and_qwen_with_a_fresh_projector(siglip, qwen, tmp_path, visual_tokens):
    config = from_hf.FromHFConfig(str(tmp_path / "out"), str(siglip[0]), str(qwen[0]), visual_tokens=visual_tokens)
    from_hf.convert(config)
    fresh = from_hf.fresh_projector(load_description(find_checkpoint(config.out)).model, config.seed or 0)
    weights = [torch.from_numpy(fresh[f"projector.{name}.kernel"].T.copy()) for name in ("fc1", "fc2")]

    def projector(x):  # biases of a fresh projector are zero
        return torch.nn.functional.gelu(x @ weights[0].T) @ weights[1].T

    def vision(pixels):
        return siglip[1](pixels, output_hidden_states=True).hidden_states[-2]

    for num_images in NUM_IMAGES:
        tokens, images = random_row(num_images, visual_tokens)
        expected = published_logits(
            vision, projector, qwen[1], torch.from_numpy(tokens), torch_pixels(images), visual_tokens, IMAGE_TOKEN
        )
        check_equal(f"SigLIP + Qwen2, {num_images} images", our_logits(config.out, tokens, images), expected)


@pytest.mark.parametrize("visual_tokens", [4, NUM_PATCHES])
@pytest.mark.parametrize("is_vision_trained", [True, False])
def test_a_published_checkpoint(published_parts, qwen, tmp_path, visual_tokens, is_vision_trained):
    vision, projector, decoder = published_parts
    run_dir = write_prismatic_run(tmp_path / "run", published_parts, visual_tokens, is_vision_trained)
    timm_file = None
    if not is_vision_trained:
        timm_file = str(tmp_path / "timm.pt")
        torch.save(vision.state_dict(), timm_file)
    config = from_prismatic.FromPrismaticConfig(str(run_dir), str(tmp_path / "out"), timm_file, decoder=str(qwen[0]))
    from_prismatic.convert(config)
    round_rotary(decoder)
    for num_images in NUM_IMAGES:
        tokens, images = random_row(num_images, visual_tokens)
        expected = published_logits(
            vision, projector, decoder, torch.from_numpy(tokens), torch_pixels(images), visual_tokens, IMAGE_TOKEN
        )
        check_equal(f"published, {num_images} images", our_logits(config.out, tokens, images), expected)


def exported(checkpoint, out, **kwargs):
    """The exported model and its processor, as a user loads them."""
    to_hf.export(to_hf.ToHFConfig(str(checkpoint), str(out), dtype="float32"))
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, **kwargs).eval()
    return model, AutoProcessor.from_pretrained(out)


@pytest.fixture(scope="module")
def native(llava, tmp_path_factory):
    """(checkpoint, exported model, processor) that came in as a Llava and went out as one."""
    folder = tmp_path_factory.mktemp("native")
    from_hf.convert(from_hf.FromHFConfig(str(folder / "in"), model=str(llava[0]), template="open_qwen2vl"))
    return folder / "in", *exported(folder / "in", folder / "out")


@pytest.fixture(scope="module")
def pooled(published_parts, qwen, tmp_path_factory):
    """The same of a published checkpoint with 4 visual tokens and rounded rotary frequencies."""
    folder = tmp_path_factory.mktemp("pooled")
    run_dir = write_prismatic_run(folder / "run", published_parts, 4, is_vision_trained=True)
    from_prismatic.convert(
        from_prismatic.FromPrismaticConfig(str(run_dir), str(folder / "in"), decoder=str(qwen[0]), template="plain")
    )
    return folder / "in", *exported(folder / "in", folder / "out", trust_remote_code=True)


@pytest.fixture(params=["native", "pooled"])
def bridge(request):
    return request.getfixturevalue(request.param)


def test_the_native_export_is_transformers_own_class(native):
    assert type(native[1]).__module__ == "transformers.models.llava.modeling_llava"


def test_logits_of_the_exported_model(bridge):
    checkpoint, model, _ = bridge
    visual_tokens = load_description(find_checkpoint(str(checkpoint))).model.num_visual_tokens
    for num_images in NUM_IMAGES:
        tokens, images = random_row(num_images, visual_tokens, length=40)
        pixels = {"pixel_values": torch_pixels(images)} if num_images else {}
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(tokens[None]), **pixels).logits[0]
        check_equal(f"{type(model).__name__}, {num_images} images", our_logits(checkpoint, tokens, images), expected)


def test_pixels_of_the_exported_processor_equal_the_loader(bridge, photos):
    from PIL import Image

    for path in photos:
        with Image.open(path) as image:
            theirs = bridge[2].image_processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        with open(path, "rb") as file:
            ours = np.asarray(normalize(jnp.asarray(decode_image(file.read(), IMAGE_SIZE)), jnp.float32))
        error = np.abs(ours - theirs).max()
        print(f"{path}: pixel error {error:.1e}")
        assert error <= PIXEL_TOLERANCE


QUESTIONS = ("what is it?", "is there a red  shape ?", "Bäume, 木, 🌳", "<image_pad> or not", "a\n\nb")


@pytest.mark.parametrize("num_images", NUM_IMAGES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_replies_have_identical_token_ids(bridge, photos, question, num_images):
    from PIL import Image

    checkpoint, model, processor = bridge
    generator = Generator(str(checkpoint))
    prompt = generator.encode_prompt(question, num_images)
    ours = generator.generate([Request(prompt, read_images(photos[:num_images]))], SamplingOptions(12))[0].tokens
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(path) for path in photos[:num_images]] or None
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt
    with torch.no_grad():
        theirs = model.generate(**inputs, max_new_tokens=12)[0, len(prompt) :].tolist()
    eos = generator.codec.special.eos
    assert [token for token in theirs if token != eos] == ours


@pytest.mark.parametrize("template", ["plain", "open_qwen2vl", "open_qwen2vl_released", "chatml"])
def test_serving_software_sees_that_the_template_takes_images(template):
    """vLLM looks for a loop over message.content at the top level (not in a macro); else it would write <image>."""
    import jinja2

    from convert.export_files.chat_templates import TEMPLATES

    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(TEMPLATES[template].replace("FIRST", "{}"))
    assert not list(tree.find_all(jinja2.nodes.Macro))
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert any(isinstance(over, jinja2.nodes.Getattr) and over.attr == "content" for over in loops)


def test_a_message_of_another_kind_is_refused(native):
    messages = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(Exception, match="only text, and images of the user, are taken: video"):
        native[2].apply_chat_template(messages)


def test_native_on_a_pooled_model_is_refused_with_the_reason(pooled, tmp_path):
    config = to_hf.ToHFConfig(str(pooled[0]), str(tmp_path / "no"), native=True)
    with pytest.raises(Exception, match=r"pools 16 patches to 4 visual tokens.*rounded to bfloat16"):
        to_hf.export(config)
    assert not list(tmp_path.iterdir())


def test_a_converted_checkpoint_starts_training_and_is_no_run_directory(siglip, qwen, tmp_path):
    from oq2vl_jax.config_files import load_config
    from oq2vl_jax.errors import UserError
    from oq2vl_jax.train.run import run

    out = str(tmp_path / "weights")
    from_hf.convert(from_hf.FromHFConfig(out, str(siglip[0]), str(qwen[0]), visual_tokens=4))
    description = load_description(find_checkpoint(out))
    tiny = load_config("configs/tiny.py")
    config = dataclasses.replace(
        tiny, model=description.model, init_from=out, num_steps=2, run_dir=str(tmp_path / "run")
    )
    assert run(config)
    with pytest.raises(UserError, match="holds converted weights; name it in --init-from"):
        run(dataclasses.replace(config, init_from=None, run_dir=out))
    rounded = dataclasses.replace(config.model.decoder, rope_inv_freq="bfloat16")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=rounded))
    message = r"model.decoder.rope_inv_freq is float32 there, bfloat16 here.*--model.decoder.rope-inv-freq float32"
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(other, run_dir=str(tmp_path / "other")))
