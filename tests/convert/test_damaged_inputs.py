"""What people bring that cannot be used: one clear sentence, exit code 2, and nothing written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import from_hf, from_prismatic
from convert.prismatic import LATEST
from convert.tensor_files import INDEX
from oq2vl_jax.checkpoint import find_checkpoint
from oq2vl_jax.errors import UserError
from tests.convert.conftest import IMAGE_TOKEN, WIDTH
from tests.convert.test_round_trips import write_prismatic_run


def edit_tensors(folder, edit):
    """Rewrites the file of a folder that is not sharded."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def fails(tmp_path, vision, decoder, message, **options):
    out = tmp_path / "new" / "out"
    with pytest.raises(UserError, match=message) as caught:
        from_hf.convert(from_hf.FromHFConfig(str(out), str(vision), str(decoder), visual_tokens=4, **options))
    assert "\n" not in str(caught.value)
    assert not out.parent.exists()


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_truncated_safetensors(parts, tmp_path):
    file = first_shard(parts[1])
    file.write_bytes(file.read_bytes()[:-10])
    fails(tmp_path, *parts, rf"{file.name}: no whole safetensors file .*fetch it again")


def test_a_missing_shard_of_the_index(parts, tmp_path):
    first_shard(parts[1]).unlink()
    fails(tmp_path, *parts, r"model-00001-of-.* missing, of \d+ files that model.safetensors.index.json names")


def test_an_index_that_points_outside(parts, tmp_path):
    index = json.loads((parts[1] / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    (parts[1] / INDEX).write_text(json.dumps(index))
    fails(tmp_path, *parts, r"is no plain file name")


def test_a_shard_that_lacks_what_the_index_says(parts, tmp_path):
    index = json.loads((parts[1] / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = first_shard(parts[1]).name
    (parts[1] / INDEX).write_text(json.dumps(index))
    fails(tmp_path, *parts, r"lacks model.layers.9.mlp.up_proj.weight \(1 tensors\)")


def test_wrong_width(parts, tmp_path):
    edit_config(parts[1], hidden_size=64)
    fails(tmp_path, *parts, r"model.embed_tokens.weight has shape \(320, 32\), expected \(320, 64\); .*and \d+ more")


def test_missing_unexpected_and_misshapen_weights_are_reported_together(parts, tmp_path):
    def edit(tensors):
        prefix = "vision_model." if "vision_model.embeddings.patch_embedding.bias" in tensors else ""
        layer = f"{prefix}encoder.layers.1."
        tensors[f"{layer}mlp.fc_one.weight"] = tensors.pop(f"{layer}mlp.fc1.weight")
        tensors[f"{layer}mlp.fc2.bias"] = torch.zeros(WIDTH + 1)

    edit_tensors(parts[0], edit)
    hint = r"\(there is 'vision_model.encoder.layers.1.mlp.fc_one.weight'\)"
    fails(tmp_path, *parts, rf"layers.1.mlp.fc1.weight is missing {hint}")
    fails(tmp_path, *parts, r"layers.1.mlp.fc2.bias has shape \(25,\), expected \(24,\)")
    fails(tmp_path, *parts, r"layers.1.mlp.fc_one.weight has no place in this model")


def test_a_head_that_is_not_the_embedding_it_is_tied_to(parts, tmp_path, qwen):
    index = json.loads((parts[1] / INDEX).read_text())
    extra = torch.randn_like(qwen[1].lm_head.weight)
    save_file({"lm_head.weight": extra}, parts[1] / "head.safetensors", metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (parts[1] / INDEX).write_text(json.dumps(index))
    fails(tmp_path, *parts, r"lm_head.weight differs from model.embed_tokens.weight, but .* tied")
    save_file({"lm_head.weight": qwen[1].lm_head.weight.detach().clone()}, parts[1] / "head.safetensors")
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "out"), str(parts[0]), str(parts[1]), visual_tokens=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
        ({"hidden_size": "wide"}, "expected int"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'silu'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "rope_type is 'linear'"),
        ({"vocab_size": 279}, r"the tokenizer has 280 entries .* the decoder's embedding 279"),
    ],
)
def test_a_decoder_that_this_model_is_not(parts, tmp_path, values, message):
    edit_config(parts[1], **values)
    fails(tmp_path, *parts, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', expected 'gelu'"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer is \[-2, -3\], expected one layer"),
        ({"vision_feature_layer": -40}, "the features leave 39 of 4 blocks unused; none is left"),
        ({"vision_config": None}, "not a configuration of such a model"),
        ({"text_config": {"model_type": "qwen2", "num_attention_heads": 0}}, "not a configuration of such a model"),
        ({"text_config": {"model_type": "qwen2", "rope_theta": None}}, "config.json"),
        ({"oq2vl_jax": []}, "not a configuration of such a model"),
        (
            {"oq2vl_jax": {"template": "x"}},
            "template is 'x', expected one of plain, open_qwen2vl, open_qwen2vl_released, chatml",
        ),
        ({"oq2vl_jax": {"rope_inv_freq": "int8"}}, "rope_inv_freq: expected"),
        ({"num_visual_tokens": "16"}, "config.json"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', expected 'llava'"),
    ],
)
def test_a_llava_that_this_model_is_not(llava, tmp_path, values, message):
    shutil.copytree(llava[0], tmp_path / "llava")
    edit_config(tmp_path / "llava", **values)
    with pytest.raises(UserError, match=message):
        from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "out"), model=str(tmp_path / "llava")))
    assert not (tmp_path / "out").exists()


def test_a_llava_whose_image_token_has_another_name_comes_in(llava, tmp_path):
    """llava-hf models of this family call it <image>; which row of the embedding marks an image is free."""
    from oq2vl_jax.checkpoint import load_description

    shutil.copytree(llava[0], tmp_path / "llava")
    edit_config(tmp_path / "llava", image_token_index=3)
    from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "out"), model=str(tmp_path / "llava")))
    assert load_description(find_checkpoint(str(tmp_path / "out"))).model.image_token_id == IMAGE_TOKEN


def test_two_names_of_the_same_weight(llava, tmp_path):
    shutil.copytree(llava[0], tmp_path / "llava")
    name = "language_model.model.norm.weight"
    edit_tensors(
        tmp_path / "llava", lambda tensors: tensors.update({f"model.{name[:15]}norm.weight": tensors[name] + 0})
    )
    with pytest.raises(UserError, match="are two names of the same weight"):
        from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "out"), model=str(tmp_path / "llava")))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_broken_tokenizer(parts, tmp_path, content):
    (parts[1] / "tokenizer.json").write_text(content)
    fails(tmp_path, *parts, "no tokenizer could be loaded")


def test_a_llava_with_another_preprocessing(llava, tmp_path):
    shutil.copytree(llava[0], tmp_path / "llava")
    (tmp_path / "llava" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.48, 0.46, 0.41]}))
    with pytest.raises(UserError, match=r"preprocessor_config.json: image_mean is \[0.48, 0.46, 0.41\]"):
        from_hf.convert(from_hf.FromHFConfig(str(tmp_path / "out"), model=str(tmp_path / "llava")))


def test_features_of_another_layer_are_followed(llava, tmp_path):
    """vision_feature_layer -1 holds one block more than -2, -3 one less."""
    from oq2vl_jax.checkpoint import load_description

    for layer, num_layers in ((-1, 5), (-2, 4), (-3, 3)):
        folder, out = tmp_path / f"llava{layer}", tmp_path / f"out{layer}"
        shutil.copytree(llava[0], folder)
        edit_config(folder, vision_feature_layer=layer)
        from_hf.convert(from_hf.FromHFConfig(str(out), model=str(folder)))
        assert load_description(find_checkpoint(str(out))).model.vision.num_layers == num_layers


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def prismatic_fails(run_dir, qwen, message, vision=None):
    out = run_dir.parent / "new" / "out"
    config = from_prismatic.FromPrismaticConfig(str(run_dir), str(out), vision, decoder=str(qwen[0]))
    with pytest.raises(UserError, match=message):
        from_prismatic.convert(config)
    assert not out.parent.exists()


def test_a_pickle_with_code_in_it(published_parts, qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = write_prismatic_run(tmp_path / "run", published_parts, 4, is_vision_trained=True)
    torch.save({"model": {"projector": Bomb()}}, run_dir / LATEST)
    prismatic_fails(run_dir, qwen, r"holds more than tensors .* could run code, and is not loaded")
    (run_dir / LATEST).write_bytes(pickle.dumps(Bomb()))
    prismatic_fails(run_dir, qwen, r"latest-checkpoint.pt")
    assert not Path("exploded").exists()


def test_other_damage_to_a_published_checkpoint(published_parts, qwen, tmp_path):
    run_dir = write_prismatic_run(tmp_path / "run", published_parts, 4, is_vision_trained=False)
    prismatic_fails(run_dir, qwen, r"holds no vision encoder .* --vision")
    whole = (run_dir / LATEST).read_bytes()
    (run_dir / LATEST).write_bytes(whole[: len(whole) // 2])
    prismatic_fails(run_dir, qwen, r"no whole torch file")
    (run_dir / LATEST).write_bytes(b"")
    prismatic_fails(run_dir, qwen, r"latest-checkpoint.pt")
    torch.save({"state": {}}, run_dir / LATEST)
    prismatic_fails(run_dir, qwen, r"expected a dict with the key 'model'")
    torch.save({"model": {"projector": {"mlp_projector.0.weight": torch.ones(2, dtype=torch.int8)}}}, run_dir / LATEST)
    prismatic_fails(run_dir, qwen, r"mlp_projector.0.weight is of type torch.int8, expected float32")
    (run_dir / LATEST).unlink()
    prismatic_fails(run_dir, qwen, r"no such file; there: no checkpoints/\*\.pt")
    (run_dir / LATEST).write_bytes(whole)
    (run_dir / "config.json").write_text(json.dumps({"model": None}))
    prismatic_fails(run_dir, qwen, r"not a configuration of such a model")
    (run_dir / "config.json").write_text(json.dumps({"model": {"arch_specifier": "gelu-mlp"}}))
    prismatic_fails(run_dir, qwen, r"arch_specifier is 'gelu-mlp', expected one that ends in 'avgpool'")
