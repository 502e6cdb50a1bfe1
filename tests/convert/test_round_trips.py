"""In and out again: every tensor equal bit for bit, in every direction."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import from_hf, from_prismatic, to_hf, to_prismatic
from convert.export_weights import exported_shapes
from convert.from_hf import llava_name, siglip_name
from convert.prismatic import LATEST
from convert.tensor_files import INDEX
from convert.weight_map import LAYOUTS, their_shape, unused_vision, weights_of
from oq2vl_jax.config import DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.errors import UserError
from tests.convert.conftest import BLOCKS, DECODER_WIDTH, HEADS, HIDDEN, IMAGE_SIZE, IMAGE_TOKEN, PATCH, WIDTH


def published_model(visual_tokens):
    """The configuration of `published_parts`."""
    return {
        "vision": vars(VisionConfig(IMAGE_SIZE, PATCH, WIDTH, HIDDEN, BLOCKS, HEADS)),
        "decoder": vars(DecoderConfig(320, DECODER_WIDTH, 48, 3, 4, 2, 8, rope_theta=1e6, rope_inv_freq="bfloat16")),
        "num_visual_tokens": visual_tokens,
        "image_token_id": IMAGE_TOKEN,
    }


def write_prismatic_run(run_dir, parts, visual_tokens, is_vision_trained):
    """A run directory as the published trainer leaves it: float32, the tied head stored twice."""
    vision, projector, decoder = parts
    state = {
        "projector": {f"mlp_projector.{name}": value for name, value in projector.state_dict().items()},
        "llm_backbone": {f"llm.{name}": value.clone() for name, value in decoder.state_dict().items()},
    }
    if is_vision_trained:
        state["vision_backbone"] = {f"featurizer.{name}": value for name, value in vision.state_dict().items()}
    (run_dir / "checkpoints").mkdir(parents=True)
    torch.save({"model": state}, run_dir / LATEST)
    extra = {"model": published_model(visual_tokens), "template": "open_qwen2vl"}
    (run_dir / "config.json").write_text(json.dumps({"model": {}, "oq2vl_jax": extra}))
    return run_dir


def read_folder(folder, rename=lambda name: name):
    """All tensors of a Hugging Face folder."""
    return {
        rename(name): value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
    }


def assert_same(there, back, ignored):
    """Bit for bit, in both sets of names but `ignored`."""
    names = set(there) - ignored
    assert names == set(back) - ignored
    assert names
    for name in names:
        assert there[name].dtype == back[name].dtype, name
        assert torch.equal(there[name], back[name]), name


def behind_the_features(layout):
    shapes = {"vision.layers.mlp.fc1.kernel": (BLOCKS - 1, WIDTH, HIDDEN)}
    model = ModelConfig(
        VisionConfig(**published_model(4)["vision"]), DecoderConfig(**published_model(4)["decoder"]), 4, 0
    )
    from convert.import_weights import parameter_shapes

    return set(unused_vision(layout, parameter_shapes(model) | shapes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llava_in_and_out(llava, tmp_path, dtype):
    theirs = tmp_path / "theirs"
    llava[1].to(getattr(torch, dtype)).save_pretrained(theirs)
    llava[1].float()
    for file in llava[0].glob("*token*"):
        (theirs / file.name).write_bytes(file.read_bytes())
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), model=str(theirs)))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype=dtype))
    there, back = read_folder(theirs, llava_name), read_folder(tmp_path / "out", llava_name)
    assert_same(there, back, behind_the_features("llava"))
    # and the export itself, whole
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in2"), model=str(tmp_path / "out")))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in2"), str(tmp_path / "out2"), dtype=dtype))
    assert_same(read_folder(tmp_path / "out"), read_folder(tmp_path / "out2"), set())
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "out2" / "config.json").read_text()


def test_siglip_and_qwen_in_and_out(siglip, qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 30_000)  # several shards
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), str(siglip[0]), str(qwen[0]), visual_tokens=4))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype="float32"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    back = read_folder(tmp_path / "out", llava_name)
    assert set(index["weight_map"]) == set(read_folder(tmp_path / "out"))
    vision = {f"vision_tower.{siglip_name(n)}": v for n, v in read_folder(siglip[0]).items() if "text" not in n}
    decoder = {f"language_model.{name}": value for name, value in read_folder(qwen[0]).items()}
    ignored = behind_the_features("llava") | {"vision_tower.logit_scale", "vision_tower.logit_bias"}
    ignored |= {name for name in back if name.startswith("multi_modal_projector")} | {"language_model.lm_head.weight"}
    assert_same(vision | decoder, back, ignored)


@pytest.mark.parametrize("is_vision_trained", [True, False])
def test_prismatic_in_and_out(published_parts, qwen, tmp_path, is_vision_trained):
    run_dir = write_prismatic_run(tmp_path / "run", published_parts, 4, is_vision_trained)
    torch.save(published_parts[0].state_dict(), tmp_path / "timm.pt")
    vision = None if is_vision_trained else str(tmp_path / "timm.pt")
    from_prismatic.convert(
        from_prismatic.FromPrismaticConfig(str(run_dir), str(tmp_path / "in"), vision, decoder=str(qwen[0]))
    )
    to_prismatic.export(
        to_prismatic.ToPrismaticConfig(
            str(tmp_path / "in"), str(tmp_path / "out"), without_vision=not is_vision_trained
        )
    )
    there, back = (torch.load(folder / LATEST, weights_only=True)["model"] for folder in (run_dir, tmp_path / "out"))
    assert set(there) == set(back)
    unused = {name.split(".", 1)[1] for name in behind_the_features("prismatic")}
    for part in there:
        assert_same(there[part], back[part], unused)
    vision = published_parts[0].state_dict()
    if is_vision_trained:  # a strict load_state_dict of the published code finds every weight, of the right shape
        names = {name.removeprefix("featurizer."): value.shape for name, value in back["vision_backbone"].items()}
        assert names == {name: value.shape for name, value in vision.items()}


def test_a_pooled_export_comes_back_as_it_was(published_parts, qwen, tmp_path):
    run_dir = write_prismatic_run(tmp_path / "run", published_parts, 9, is_vision_trained=True)
    from_prismatic.convert(from_prismatic.FromPrismaticConfig(str(run_dir), str(tmp_path / "in"), decoder=str(qwen[0])))
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out"), dtype="float32"))
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in2"), model=str(tmp_path / "out")))
    from oq2vl_jax.checkpoint import find_checkpoint, load_description

    first, second = (load_description(find_checkpoint(str(tmp_path / name))) for name in ("in", "in2"))
    assert (first.model, first.template) == (second.model, second.template)
    to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in2"), str(tmp_path / "out2"), dtype="float32"))
    assert_same(read_folder(tmp_path / "out"), read_folder(tmp_path / "out2"), set())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_of_the_table_is_its_own_inverse(layout):
    model = ModelConfig(
        VisionConfig(30, 7, 24, 40, 4, 3), DecoderConfig(97, 32, 48, 3, 4, 2, 8, tie_word_embeddings=False), 4, 5
    )
    from convert.import_weights import parameter_shapes

    shapes = parameter_shapes(model)
    weights = weights_of(layout, shapes)
    assert len({weight.theirs for weight in weights}) == len(weights)
    rng = np.random.default_rng(0)
    for weight in weights:
        theirs = rng.normal(size=their_shape(weight, shapes)).astype(np.float32)
        ours = weight.row.transform.to_ours(theirs)
        assert np.array_equal(weight.row.transform.to_theirs(ours), theirs)
        assert [part.shape for part in ours] == [
            shapes[name] if weight.layer is None else shapes[name][1:] for name in weight.row.ours
        ]


@pytest.mark.parametrize("layout", ["llava", "open_qwen2vl", "prismatic"])
def test_a_whole_layout_names_every_parameter(layout):
    model = ModelConfig(
        VisionConfig(30, 7, 24, 40, 4, 3), DecoderConfig(97, 32, 48, 3, 4, 2, 8, tie_word_embeddings=False), 4, 5
    )
    from convert.import_weights import parameter_shapes

    shapes = parameter_shapes(model)
    named = {name for weight in weights_of(layout, shapes) for name in weight.row.ours}
    assert named == set(shapes)


@pytest.mark.parametrize("layout", ["llava", "open_qwen2vl", "prismatic"])
def test_a_parameter_without_a_row_in_the_table_is_named(layout):
    shapes = {"projector.gate.kernel": (3, 4)}
    with pytest.raises(UserError, match=r"projector\.gate\.kernel \(3, 4\) has no row in the weight table"):
        exported_shapes(layout, shapes, {})


def test_an_export_that_would_lack_a_parameter_is_refused(llava, tmp_path, monkeypatch):
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "in"), model=str(llava[0])))
    rows = [row for row in LAYOUTS["llava"] if "decoder.norm.scale" not in row.ours]
    monkeypatch.setitem(LAYOUTS, "llava", rows)
    with pytest.raises(UserError, match=r"decoder\.norm\.scale .* has no row"):
        to_hf.export(to_hf.ToHFConfig(str(tmp_path / "in"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
