"""Converts ModelConfig to the config.json of an export, and says which classes can express a model."""

from typing import Any, get_args, get_type_hints

from oq2vl_jax.config import ModelConfig, ProjectorConfig
from oq2vl_jax.data.text.templates import SpecialTokens
from oq2vl_jax.errors import UserError

from .hf_config import ACTIVATIONS, EXTRA_KEY, NO_LAST_BLOCK, POOLED_MODEL_TYPE, decoder_class


def to_llava_config(model: ModelConfig, template: str, dtype: str, special: SpecialTokens) -> dict[str, Any]:
    """Returns config.json of an export: transformers' own Llava if that is exactly our model, else `pooled_values`."""
    from transformers import LlavaConfig, SiglipVisionConfig

    theirs_of = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    vision = SiglipVisionConfig(
        hidden_size=model.vision.hidden_size,
        intermediate_size=model.vision.intermediate_size,
        num_hidden_layers=model.vision.num_layers,
        num_attention_heads=model.vision.num_heads,
        image_size=model.vision.image_size,
        patch_size=model.vision.patch_size,
        hidden_act=theirs_of[model.vision.activation],
        layer_norm_eps=model.vision.layer_norm_eps,
        vision_use_head=False,
    )
    text = decoder_class(model.decoder.kind)(
        vocab_size=model.decoder.vocab_size,
        hidden_size=model.decoder.hidden_size,
        intermediate_size=model.decoder.intermediate_size,
        num_hidden_layers=model.decoder.num_layers,
        num_attention_heads=model.decoder.num_heads,
        num_key_value_heads=model.decoder.num_kv_heads,
        rms_norm_eps=model.decoder.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.decoder.rope_theta},
        tie_word_embeddings=model.decoder.tie_word_embeddings,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
    )
    if model.decoder.kind == "qwen3" or (model.decoder.head_dim * model.decoder.num_heads != model.decoder.hidden_size):
        text.head_dim = model.decoder.head_dim
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=model.image_token_id,
        image_seq_length=model.num_visual_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=NO_LAST_BLOCK,
        vision_feature_select_strategy="full",
        tie_word_embeddings=model.decoder.tie_word_embeddings,
    )
    text.rope_theta = model.decoder.rope_theta  # read here by transformers 4, in rope_parameters by 5
    values = config.to_dict() | {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": dtype,
        "image_token_id": model.image_token_id,  # transformers' newer name of image_token_index
        EXTRA_KEY: {"template": template, "rope_inv_freq": model.decoder.rope_inv_freq},
    }
    return values | (pooled_values(model) if why_not_native(model) else {})


def pooled_values(model: ModelConfig) -> dict[str, Any]:
    """Returns the keys of config.json that a model with modeling_open_qwen2vl.py needs."""
    return {
        "model_type": POOLED_MODEL_TYPE,
        "architectures": ["OpenQwen2VLForConditionalGeneration"],
        "num_visual_tokens": model.num_visual_tokens,
        "projector_kind": model.projector.kind,
        "rope_inv_freq": model.decoder.rope_inv_freq,
        "auto_map": {
            "AutoConfig": "modeling_open_qwen2vl.OpenQwen2VLConfig",
            "AutoModel": "modeling_open_qwen2vl.OpenQwen2VLModel",
            "AutoModelForImageTextToText": "modeling_open_qwen2vl.OpenQwen2VLForConditionalGeneration",
        },
    }


def check_has_export(model: ModelConfig) -> None:
    """Raises UserError for a model that no layout and no module of ours describes: a projector of the researcher's own,
    a decoder between Qwen2 and Qwen3."""
    if not model.decoder.is_published_kind:
        raise UserError(
            f"model.decoder: qkv_bias = {model.decoder.has_qkv_bias} and qk_norm = {model.decoder.has_qk_norm} are "
            "neither Qwen2's (True, False) nor Qwen3's (False, True), and no class of transformers computes that."
        )
    if model.projector.own is not None:
        raise UserError(
            f"model.projector.own = {model.projector.own}: to_hf writes the projectors "
            f"{', '.join(get_args(get_type_hints(ProjectorConfig)['kind']))} only; write this one's weights and its "
            "PyTorch module yourself (docs/extend.md)."
        )


def why_not_native(model: ModelConfig) -> str | None:
    """Returns why transformers' LlavaForConditionalGeneration cannot express this model; None if it can."""
    reasons = []
    if model.projector.kind != "avg_pool_mlp":
        reasons.append(f"its projector is {model.projector.kind}")
    elif model.num_visual_tokens != model.vision.num_patches:
        reasons.append(
            f"it pools {model.vision.num_patches} patches to {model.num_visual_tokens} visual tokens, "
            "and LlavaForConditionalGeneration has no pooling"
        )
    if model.decoder.rope_inv_freq != "float32":
        reasons.append(
            f"its rotary inverse frequencies are rounded to {model.decoder.rope_inv_freq}, and transformers' Qwen2 "
            "keeps them in float32"
        )
    return "; ".join(reasons) or None
