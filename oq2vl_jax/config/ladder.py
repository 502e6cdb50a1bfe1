"""One family of models in several sizes: everything follows from the decoder's width and depth.

    size   width  depth   parameters without and with the token table
    xs       128     12      5.4 M      24.9 M
    s        512      8       53 M       131 M
    m       1024     22     0.59 B      0.75 B
    l       1536     28     1.71 B      1.95 B     the published model

Proportions are the published model's (SigLIP-SO400M and Qwen2.5-1.5B): decoder heads of 128, a kv head for six of them,
a feed-forward of 35/6 widths; an encoder of 3/4 the width, one block shallower, with a feed-forward of 269/72 widths.
An ablation that runs on several sizes shows whether its result survives size. All sizes take the same packed rows.
"""

import dataclasses

from oq2vl_jax.config.model import DecoderConfig, ModelConfig, VisionConfig
from oq2vl_jax.config.train import TrainableConfig, TrainConfig
from oq2vl_jax.errors import UserError

TOKENS_PER_PARAMETER = 20
"""Of training from scratch (arXiv 2203.15556); the token table is not counted."""
RATE_AT_128 = 3e-3
"""Peak learning rate of width 128; it falls with the width, as hidden matrices of muP do (arXiv 2203.03466)."""


def ladder_model(width: int, depth: int, published: ModelConfig | None = None) -> ModelConfig:
    """Returns the member of the family with a decoder of `depth` layers. width: a multiple of 128. Vocabulary, image
    size and visual tokens are those of `published`. Raises UserError for another width."""
    if width % 128 or width < 128:
        raise UserError(f"width = {width} of the ladder: give a multiple of 128.")
    like, heads = published or ModelConfig.open_qwen2vl_2b(), width // 128
    vision_width = width * 3 // 4
    vision = VisionConfig(
        image_size=like.vision.image_size,
        patch_size=like.vision.patch_size,
        hidden_size=vision_width,
        intermediate_size=in_sixteens(vision_width * 269 / 72),
        num_layers=max(2, depth - 1),
        num_heads=next(n for n in range(max(1, 4 * heads // 3), 0, -1) if vision_width % n == 0),
    )
    decoder = DecoderConfig(
        vocab_size=like.decoder.vocab_size,
        hidden_size=width,
        intermediate_size=in_sixteens(width * 35 / 6),
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=next(n for n in range(max(1, heads // 6), 0, -1) if heads % n == 0),
        head_dim=128,
    )
    return dataclasses.replace(like, vision=vision, decoder=decoder)


def ladder(published: TrainConfig, width: int, depth: int) -> TrainConfig:
    """Returns the training of a member from scratch on the rows of `published`: batch, steps and learning rate follow
    from the size as well."""
    model = ladder_model(width, depth, published.model)
    rows = width // 16
    tokens = TOKENS_PER_PARAMETER * num_parameters(model)
    return dataclasses.replace(
        published,
        model=model,
        optimizer=dataclasses.replace(published.optimizer, learning_rate=RATE_AT_128 * 128 / width, beta2=0.95),
        trainable=TrainableConfig(vision=True, projector=True, decoder=True),
        global_batch_size=rows,
        num_steps=max(1, round(tokens / (rows * published.data.num_tokens))),
        rows_per_device=None,
        init_from=None,
        run_dir=f"runs/ladder_{width}x{depth}",
    )


def in_sixteens(width: float) -> int:
    """Returns the multiple of 16 below a width, which tensor cores take whole."""
    return int(width) // 16 * 16


def num_parameters(model: ModelConfig) -> int:
    """Returns the parameters of matrices without the token table; the last encoder block is not built."""
    vision, decoder = model.vision, model.decoder
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    q, kv = (n * decoder.head_dim for n in (decoder.num_heads, decoder.num_kv_heads))
    layer = decoder.hidden_size * (2 * q + 2 * kv + 3 * decoder.intermediate_size)
    projector = decoder.hidden_size * (vision.hidden_size + decoder.hidden_size)
    patches = vision.hidden_size * (3 * vision.patch_size**2 + vision.num_patches)
    return (vision.num_layers - 1) * block + decoder.num_layers * layer + projector + patches
