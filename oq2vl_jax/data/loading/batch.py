"""Batch: the contract between the data and the model.

One row of a batch, num_tokens T = 12, image slots I = 2, visual tokens M = 4 (# = image placeholder, . = padding):

    tokens       s # # # # a e s b c e .
    labels       . . . . a e - b c e - .      the id to predict at this position; . and - stand for IGNORE
    segment_ids  1 1 1 1 1 1 1 2 2 2 2 0      1, 2, ... = document of the row, 0 = padding
    positions    0 1 2 3 4 5 6 0 1 2 3 0      restart with each document
    images       [picture, zeros]             slot 0 holds the first image of the row, unused slots are zero

With attention_scope "row" segment_ids are 1 on everything but padding, positions run through the row, and the last
token of a document predicts the first of the next one, as in the published code.
"""

from typing import Any, NamedTuple

from jaxtyping import Int32, UInt8

IGNORE = -100
"""Label of a position that carries no loss: images, padding, questions, the last token of a document."""
NUM_PREFETCHED_BATCHES = 2
"""Batches prepared ahead of the train step. A published batch of 256 rows with 28 image slots is 3.2 GB."""


Tokens = Int32[Any, "B T"]
Images = UInt8[Any, "B I height width 3"]


class Batch(NamedTuple):
    """Arrays of B packed rows; numpy on the host, global jax arrays in the train step.

    tokens: int32 [B, T], 0 <= id < vocab_size; `image_token_id` at visual tokens, <|endoftext|> at padding.
    labels: int32 [B, T], already shifted: labels[b, t] is the target of position t, or IGNORE.
    positions: int32 [B, T], >= 0.
    segment_ids: int32 [B, T], 0 = padding.
    images: uint8 [B, I, height, width, 3], RGB 0..255; the k-th image of a row fills its k-th M placeholders.
    """

    tokens: Tokens
    labels: Tokens
    positions: Tokens
    segment_ids: Tokens
    images: Images
