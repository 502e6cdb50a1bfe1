"""CLIP's image and text towers (arXiv 2103.00020; Hugging Face CLIPModel) score how well a caption fits its image.

The blocks are SigLIP's, with a causal mask in the text tower and another activation. Scores are cosine similarities
without the learned temperature, as in DataComp's clip_*_similarity_score.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from oq2vl_jax.model.clip_config import ClipConfig, ClipTowerConfig
from oq2vl_jax.model.layers import LayerNorm, Linear, normal, stack_layers
from oq2vl_jax.model.siglip import SiglipBlock, patchify

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""RGB mean and standard deviation of CLIP's training images."""


class ClipImageTower(nnx.Module):
    """Maps images to features: the class token after all blocks, normalised and projected."""

    def __init__(self, key: Array, config: ClipConfig):
        tower, keys = config.image_tower, jax.random.split(key, 5)
        width, std, patch_dim = tower.hidden_size, tower.hidden_size**-0.5, 3 * config.patch_size**2
        self.class_embedding = normal(keys[0], (width,), std, ("embed",))
        self.patch_embedding = Linear(keys[1], patch_dim, width, ("patch", "embed"), std, use_bias=False)
        self.position_embedding = normal(keys[2], (config.num_patches + 1, width), std, ("position", "embed"))
        self.pre_layernorm = LayerNorm(width, tower.layer_norm_eps)
        self.layers = stack_tower(keys[3], tower)
        self.post_layernorm = LayerNorm(width, tower.layer_norm_eps)
        self.projection = Linear(keys[4], width, config.projection_dim, ("embed", "heads"), std, use_bias=False)
        self.patch_size = config.patch_size

    def __call__(self, images: UInt8[Array, "I height width 3"]) -> Float[Array, "I D"]:
        pixels = (images / jnp.float32(255) - jnp.array(MEAN)) / jnp.array(STD)
        x = self.patch_embedding(patchify(pixels, self.patch_size))
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = self.pre_layernorm(jnp.concatenate([first, x], axis=1) + self.position_embedding[...])
        x = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]
        return self.projection(self.post_layernorm(x[:, 0]))


class ClipTextTower(nnx.Module):
    """Maps token ids to features: the first end-of-text token after all blocks, normalised and projected."""

    def __init__(self, key: Array, config: ClipConfig):
        tower, keys = config.text_tower, jax.random.split(key, 4)
        width, std = tower.hidden_size, tower.hidden_size**-0.5
        self.token_embedding = normal(keys[0], (config.vocab_size, width), std, ("vocab", "embed"))
        self.position_embedding = normal(keys[1], (config.max_text_tokens, width), std, ("position", "embed"))
        self.layers = stack_tower(keys[2], tower)
        self.final_layer_norm = LayerNorm(width, tower.layer_norm_eps)
        self.projection = Linear(keys[3], width, config.projection_dim, ("embed", "heads"), std, use_bias=False)
        self.eos_id = config.eos_id

    def __call__(self, tokens: Int[Array, "I T"]) -> Float[Array, "I D"]:
        batch, length = tokens.shape
        x = self.token_embedding[...][tokens] + self.position_embedding[...][:length]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        x = jax.lax.scan(lambda x, layer: (layer(x, mask), None), x, self.layers)[0]
        end = (tokens == self.eos_id).argmax(axis=1)
        return self.projection(self.final_layer_norm(x[jnp.arange(batch), end]))


class Clip(nnx.Module):
    """Scores images against texts with the two towers."""

    def __init__(self, key: Array, config: ClipConfig):
        image_key, text_key = jax.random.split(key)
        self.image_tower = ClipImageTower(image_key, config)
        self.text_tower = ClipTextTower(text_key, config)

    def __call__(self, images: UInt8[Array, "I height width 3"], tokens: Int[Array, "I T"]) -> Float[Array, "I"]:
        """Returns the cosine similarity of image i and text i, -1..1. images: already cropped to image_size."""
        features = self.image_tower(images), self.text_tower(tokens)
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in features)
        return (image * text).sum(-1)


def stack_tower(key: Array, config: ClipTowerConfig) -> SiglipBlock:
    return stack_layers(partial(SiglipBlock, config=config), key, config.num_layers)
