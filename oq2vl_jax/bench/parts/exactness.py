"""Part b: compares every attention and the fast step with a float32 reference, at the configuration's shapes.

An error is the largest difference divided by the largest value. Beside it stands the rounding of the reference: the
plain form in the same type against the plain form in float32 with exact products.
"""

import dataclasses
from typing import Any

from oq2vl_jax.bench.parts.setting import Setting, largest_error, small_rows
from oq2vl_jax.config import Attention, TrainConfig
from oq2vl_jax.config_files import load_config

RESULTS = ("output", "dq", "dk", "dv")
ROUNDING_ALONE = ("vision.layers.self_attn.k_proj.bias",)
"""The softmax does not depend on this bias, so its gradient is zero apart from rounding."""
CPU_TOKENS, CPU_VOCABULARY = 512, 8192


def measure_attention(setting: Setting) -> dict[str, Any]:
    """Returns {"attention": a row of errors for each attention, type and shape}."""
    config = small_rows(load_config(setting.config), 1)
    names: list[Attention] = ["blocked", "kernel"] if setting.is_gpu else ["blocked"]
    rows = [row for dtype in ("bfloat16", "float32") for row in decoder_attention(config, names, dtype)]
    rows += [row for dtype in ("bfloat16", "float32") for row in encoder_attention(config, setting.is_gpu, dtype)]
    return {"attention": rows}


def measure_step(setting: Setting) -> dict[str, Any]:
    """Returns {"vocabulary": its size, "step": a row of errors for each type}."""
    config = small_rows(load_config(setting.config), 1)
    config = config if setting.is_gpu else shortened(config)
    return {"vocabulary": config.model.decoder.vocab_size, "step": step_errors(config)}


def shortened(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with shorter rows and a smaller vocabulary; full logits would take a CPU a minute."""
    vocabulary = min(CPU_VOCABULARY, config.model.decoder.vocab_size)
    decoder = dataclasses.replace(config.model.decoder, vocab_size=vocabulary)
    model = dataclasses.replace(config.model, decoder=decoder, image_token_id=vocabulary - 1)
    num_tokens = min(CPU_TOKENS, config.data.num_tokens)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, num_tokens=num_tokens))


def decoder_attention(config: TrainConfig, names: list[Attention], dtype: str) -> list[dict[str, Any]]:
    """Measures attention errors on a packed row of the configuration's length, with the decoder's heads."""
    import jax.numpy as jnp

    from oq2vl_jax.bench.synthetic_rows import make_rows
    from oq2vl_jax.train.attention_choice import random_heads

    rows, decoder = make_rows(config, 1), config.model.decoder
    documents = (jnp.asarray(rows.segment_ids), jnp.asarray(rows.positions))
    heads = (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
    label = f"packed row of {config.data.num_tokens}, heads {heads[0]}/{heads[1]} of {heads[2]}"
    return compared(label, names, documents, random_heads((1, config.data.num_tokens), heads, dtype), dtype)


def encoder_attention(config: TrainConfig, is_gpu: bool, dtype: str) -> list[dict[str, Any]]:
    """Measures attention errors on eight pictures with the encoder's heads; "kernel" is cuDNN's in bfloat16."""
    from oq2vl_jax.train.attention_choice import random_heads

    vision = config.model.vision
    heads = (vision.num_heads, vision.num_heads, vision.head_dim)
    label = f"8 pictures of {vision.num_patches} patches, {heads[0]} heads of {heads[2]}"
    names: list[Attention] = ["kernel"] if is_gpu else []
    return compared(label, names, None, random_heads((8, vision.num_patches), heads, dtype), dtype)


def compared(label: str, names: list[Attention], documents: Any, arrays: list[Any], dtype: str) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from oq2vl_jax.train.attention_choice import values_and_gradients

    with jax.default_matmul_precision("highest"):
        exact = values_and_gradients("xla", documents, [x.astype(jnp.float32) for x in arrays])
    rows = []
    for name in ("xla", *names):
        print(f"{label}, {dtype}: {name}", flush=True)
        output, _, *gradients = values_and_gradients(name, documents, arrays)
        errors = [largest_error(a, b) for a, b in zip((output, *gradients), (exact[0], *exact[2:]), strict=True)]
        rows.append({"of": label, "type": dtype, "attention": name} | dict(zip(RESULTS, errors, strict=True)))
    for row in rows:
        baseline = rows[0]
        is_rounded = min(baseline[key] for key in RESULTS) > 0  # otherwise the reference is exact in this type (CPU)
        row["times the reference's rounding"] = max(row[key] / baseline[key] for key in RESULTS) if is_rounded else None
    return rows


def with_two_layers(config: TrainConfig) -> TrainConfig:
    decoder = dataclasses.replace(config.model.decoder, num_layers=2)
    vision = dataclasses.replace(config.model.vision, num_layers=3)  # two blocks run
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder, vision=vision))


def step_errors(config: TrainConfig) -> list[dict[str, Any]]:
    """Returns errors of the fast step's loss and gradients, two layers at full width, against the plain float32 path.

    Each gradient's error is relative to that gradient's largest value. "own": error of the plain path in the same type.
    """
    import jax

    from oq2vl_jax.bench.synthetic_rows import make_rows
    from oq2vl_jax.model.layers import Compute
    from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
    from oq2vl_jax.sharding import make_mesh, to_global_batch
    from oq2vl_jax.train.gradients import loss_and_gradients
    from oq2vl_jax.train.loss import loss
    from oq2vl_jax.train.parts import split_trainable
    from oq2vl_jax.trees import merge_parts, named_arrays

    config = with_two_layers(config)
    mesh, rows = make_mesh(config.mesh), make_rows(config, 1)
    model, batch = jax.jit(lambda key: OpenQwen2VL(key, config.model))(jax.random.key(0)), to_global_batch(rows, mesh)
    trained, frozen = split_trainable(model, config)

    def plain(dtype: str) -> Any:
        print(f"plain path, {dtype}", flush=True)

        def mean(trained: Any, frozen: Any, batch: Any) -> Any:
            total, number = loss(merge_parts(trained, frozen), batch, Compute(dtype=jax.numpy.dtype(dtype)))
            return total / number

        return jax.jit(jax.value_and_grad(mean))(trained, frozen, batch)

    with jax.default_matmul_precision("highest"):
        expected, expected_gradients = plain("float32")
    reference = named_arrays(expected_gradients)

    def errors(computed: tuple[Any, Any]) -> tuple[float, tuple[float, str]]:
        gradients = named_arrays(computed[1])
        worst = max(
            (largest_error(x, reference[name]), name) for name, x in gradients.items() if name not in ROUNDING_ALONE
        )
        return abs(float(computed[0]) / float(expected) - 1), worst

    results = []
    for dtype in ("bfloat16", "float32"):
        print(f"fast step, {dtype}", flush=True)
        in_type = dataclasses.replace(config, compute_dtype=dtype)
        fast = jax.jit(lambda model, batch, c=in_type: loss_and_gradients(model, batch, c, mesh))(model, batch)
        is_exact = dtype == "float32" and jax.default_backend() == "cpu"  # a CPU's float32 products are already exact
        (of_loss, of_gradient), (own_loss, own_gradient) = (
            errors(fast),
            (0.0, (0.0, "")) if is_exact else errors(plain(dtype)),
        )
        results.append(
            {"type": dtype, "loss": float(expected), "relative error": of_loss, "own error": own_loss,
             "largest error of a gradient": of_gradient[0], "of": of_gradient[1],
             "own error of a gradient": own_gradient[0]}
        )  # fmt: skip
    return results
