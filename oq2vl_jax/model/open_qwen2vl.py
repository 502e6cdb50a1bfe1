"""Open-Qwen2VL, top of the model (arXiv 2504.00595, section 2).

    images [B I height width 3] -> SigLIP -> [B*I P vision] -> pool + MLP -> [B*I M D] -+
    tokens [B T]  -> embed_tokens -> [B T D] -- visual tokens take the image slots -----+-> Qwen2 -> hidden [B T D]

The k-th image of a row fills the k-th run of M placeholder tokens (`image_token_id`) of that row:

    tokens   s # # # # a b e s # # # # c e         # = image_token_id, M = 4
    filled   s 0 0 0 0 a b e s 1 1 1 1 c e         number = image slot of the row
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from oq2vl_jax.config import ModelConfig
from oq2vl_jax.model.projector import Projector
from oq2vl_jax.model.qwen2 import Qwen2Decoder
from oq2vl_jax.model.siglip import SiglipEncoder, normalize


class OpenQwen2VL(nnx.Module):
    def __init__(self, key: Array, config: ModelConfig):
        vision_key, projector_key, decoder_key = jax.random.split(key, 3)
        self.vision = SiglipEncoder(vision_key, config.vision)
        self.projector = Projector(projector_key, config)
        self.decoder = Qwen2Decoder(decoder_key, config.decoder)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: UInt8[Array, "B I height width 3"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        constrain: Callable[[Array], Array] = lambda x: x,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of packed rows; fields as in data/batch.py, computed in `dtype`."""
        x = self.embed(tokens, images, dtype, remat)
        return self.decoder(x, segment_ids, positions, remat, constrain)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        images: UInt8[Array, "B I height width 3"],
        dtype: DTypeLike,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """Token embeddings with the visual tokens in their places."""
        embeddings = self.decoder.embed(tokens, dtype)
        if images.shape[1] == 0:
            return embeddings
        return merge_visual_tokens(embeddings, self.encode(images, dtype, remat), tokens == self.config.image_token_id)

    def encode(
        self, images: UInt8[Array, "B I height width 3"], dtype: DTypeLike, remat: str = "none"
    ) -> Float[Array, "B IM D"]:
        """Visual tokens of a row's images, one image after the other."""
        batch, num_images, *pixel_shape = images.shape
        features = self.vision(normalize(images.reshape(batch * num_images, *pixel_shape), dtype), remat)
        visual_tokens = self.projector(features)
        return visual_tokens.reshape(batch, -1, visual_tokens.shape[-1])

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of every given position; training uses train/cross_entropy.py, which needs far less memory."""
        return jnp.einsum("BTD,VD->BTV", hidden, self.decoder.head.astype(hidden.dtype)).astype(jnp.float32)


def merge_visual_tokens(
    embeddings: Float[Array, "B T D"], visual_tokens: Float[Array, "B IM D"], is_image: Array
) -> Float[Array, "B T D"]:
    """The n-th True of a row of is_image takes the n-th visual token of that row. The loader checks that they agree."""
    index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, visual_tokens.shape[1] - 1)
    placed = jnp.take_along_axis(visual_tokens, index[:, :, None], axis=1)
    return jnp.where(is_image[:, :, None], placed, embeddings)
