"""The Open-Qwen2VL model (arXiv 2504.00595, section 2).

    images [B I height width 3] -> SigLIP -> [B*I P vision] -> projector -> [B*I M D] ---+
    tokens [B T]  -> embed_tokens -> [B T D] -- visual tokens take the image slots ------+-> Qwen2 -> hidden [B T D]

The k-th image of a row fills the k-th run of M placeholder tokens (`image_token_id`) of that row:

    tokens   s # # # # a b e s # # # # c e         # = image_token_id, M = 4
    filled   s 0 0 0 0 a b e s 1 1 1 1 c e         number = image slot of the row
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from oq2vl_jax.config import ModelConfig
from oq2vl_jax.model.layers import Compute
from oq2vl_jax.model.projector import make_projector
from oq2vl_jax.model.qwen2 import Qwen2Decoder
from oq2vl_jax.model.scopes import Scope
from oq2vl_jax.model.siglip import SiglipEncoder, normalize

IMAGES_PER_CHUNK = 8
"""Images per encoder pass; padding adds at most 7 images to a microbatch."""


class OpenQwen2VL(nnx.Module):
    def __init__(self, key: Array, config: ModelConfig):
        vision_key, projector_key, decoder_key = jax.random.split(key, 3)
        self.vision = SiglipEncoder(vision_key, config.vision)
        self.projector = make_projector(projector_key, config)
        self.decoder = Qwen2Decoder(decoder_key, config.decoder)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        images: UInt8[Array, "B I height width 3"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        compute: Compute = Compute(),
    ) -> Float[Array, "B T D"]:
        """Returns the final hidden states of packed rows in compute.dtype; arguments as in data/loading/batch.py."""
        return self.decoder(self.embed(tokens, images, compute), segment_ids, positions, compute)

    def embed(
        self, tokens: Int[Array, "B T"], images: UInt8[Array, "B I height width 3"], compute: Compute = Compute()
    ) -> Float[Array, "B T D"]:
        """Returns token embeddings with the visual tokens in the image slots."""
        return self.with_images(self.decoder.embed(tokens, compute.dtype), tokens, images, compute)

    def with_images(
        self,
        embeddings: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        images: UInt8[Array, "B I height width 3"],
        compute: Compute = Compute(),
    ) -> Float[Array, "B T D"]:
        """Encodes `images` and puts their visual tokens into `embeddings` at the placeholders in `tokens`."""
        if images.shape[1] == 0:
            return embeddings
        is_image = tokens == self.config.image_token_id
        buffer, num_images = flat_images(images, is_image.sum(axis=1) // self.config.num_visual_tokens)
        with jax.named_scope(Scope.VISION):  # bench/breakdown.py groups a profile by these scopes
            visual_tokens = self.encode_first(buffer, num_images, compute)
        return merge_visual_tokens(embeddings, visual_tokens, is_image)

    def encode(self, images: UInt8[Array, "I height width 3"], compute: Compute = Compute()) -> Float[Array, "I M D"]:
        """Returns the visual tokens of every image."""
        return self.projector(self.reduced_features(images, compute))

    def encode_first(
        self, images: UInt8[Array, "I height width 3"], num_images: Int[Array, ""], compute: Compute = Compute()
    ) -> Float[Array, "I M D"]:
        """Returns the visual tokens of the first num_images of a buffer; those of the empty slots are meaningless.

        Chunks of IMAGES_PER_CHUNK without an image are skipped at run time, so padding costs less than one chunk.
        """
        size = min(IMAGES_PER_CHUNK, len(images))
        padded = jnp.pad(images, ((0, -len(images) % size), *((0, 0),) * 3))
        chunks = padded.reshape(-1, size, *images.shape[1:])
        features = partial(self.reduced_features, compute=compute)
        empty = jax.eval_shape(features, chunks[0])

        def encode_chunk(_, chunk_and_start):
            chunk, start = chunk_and_start
            return None, jax.lax.cond(start < num_images, features, lambda _: jnp.zeros_like(empty), chunk)

        _, reduced = jax.lax.scan(encode_chunk, None, (chunks, jnp.arange(0, len(padded), size)))
        return self.projector(reduced.reshape(-1, *empty.shape[1:])[: len(images)])

    def reduced_features(
        self, images: UInt8[Array, "I height width 3"], compute: Compute = Compute()
    ) -> Float[Array, "I M reduced_dim"]:
        """Encodes images and reduces their patches to visual tokens, the input of the projector."""
        return self.projector.reduce(self.vision(normalize(images, compute.dtype), compute))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of every position; training uses train/cross_entropy.py, which needs less memory."""
        return jnp.einsum("BTD,VD->BTV", hidden, self.decoder.head.astype(hidden.dtype)).astype(jnp.float32)


def flat_images(
    images: UInt8[Array, "B I height width 3"], counts: Int[Array, "B"]
) -> tuple[UInt8[Array, "BI height width 3"], Int[Array, ""]]:
    """Returns the images of all rows in order, followed by the empty slots, and the number of images.

    counts: images of each row; they fill its first slots.

        rows    A B . .     C . . .     D E F .        . = empty slot
        buffer  A B C D E F . . . . . .
    """
    is_empty = jnp.arange(images.shape[1]) >= counts[:, None]
    order = jnp.argsort(is_empty.reshape(-1), stable=True)
    return images.reshape(-1, *images.shape[2:])[order], counts.sum()


def merge_visual_tokens(
    embeddings: Float[Array, "B T D"], visual_tokens: Float[Array, "I M D"], is_image: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Puts the n-th visual token at the n-th True of is_image, over all rows; the loader checks that counts agree."""
    flat = visual_tokens.reshape(-1, visual_tokens.shape[-1])
    index = jnp.clip(jnp.cumsum(is_image.reshape(-1)) - 1, 0, len(flat) - 1).reshape(is_image.shape)
    return jnp.where(is_image[:, :, None], flat[index], embeddings)
