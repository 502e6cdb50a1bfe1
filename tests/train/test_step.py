"""One loss and one gradient, however the step is computed; images beyond the real ones cost less than a chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oq2vl_jax.bench.synthetic_rows import make_rows
from oq2vl_jax.config import ExecutionConfig, LossConfig, MeshConfig, TrainableConfig
from oq2vl_jax.data.loading.batch import IGNORE
from oq2vl_jax.model import open_qwen2vl
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.sharding import make_mesh, to_global_batch
from oq2vl_jax.train.gradients import compute_copy, loss_and_gradients, total_loss
from oq2vl_jax.train.loss import loss
from oq2vl_jax.trees import named_arrays
from tests.train.conftest import TINY, tiny_model

LOSS_TOLERANCE = 1e-6  # relative; measured 2e-7
GRADIENT_TOLERANCE = 1e-5  # of a parameter's largest gradient; measured 3e-6
WAYS = {
    "blocked": {"attention": "blocked"},
    "kernel": {"attention": "kernel_interpreted"},
    "microbatches, dots": {"rows_per_device": 1, "remat": "dots"},
    "kernel, dots": {"attention": "kernel_interpreted", "remat": "dots"},
    "attention kept, fsdp": {"attention": "blocked", "remat": "attention", "sharding": "fsdp", "rows_per_device": 1},
    "everything kept, fsdp": {"sharding": "fsdp"},
    "nothing kept, fsdp": {"remat": "full", "sharding": "fsdp"},
    "gate and up apart, a scan over the layers": {"execution": ExecutionConfig("apart", "scan")},
    "the same, fsdp, dots": {"execution": ExecutionConfig("apart", "scan"), "sharding": "fsdp", "remat": "dots"},
    "plain": {"gradients": "plain"},
    "plain, fsdp, microbatches, dots": {
        "gradients": "plain",
        "sharding": "fsdp",
        "rows_per_device": 1,
        "remat": "dots",
    },
    "kernel, wide tiles": {"attention": "kernel_interpreted", "execution": ExecutionConfig(tiles="128x64")},
}


@pytest.fixture(scope="module")
def rows():
    return make_rows(dataclasses.replace(TINY, global_batch_size=16), 16, seed=1)


def whole_logits_loss(model, rows):
    """The reference: every logit at once, reference attention, no sharding."""
    total, num_labelled = loss(model, jax.tree.map(jnp.asarray, rows))
    return total / jnp.maximum(num_labelled, 1)


@pytest.fixture(scope="module")
def expected(rows):
    loss, gradients = jax.jit(jax.value_and_grad(whole_logits_loss))(tiny_model(), rows)
    return float(loss), {name: np.asarray(x) for name, x in named_arrays(gradients).items()}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_loss_and_gradients_of_whole_logits(way, rows, expected):
    changes = dict(WAYS[way])
    mesh_config = MeshConfig(2, 4, changes.pop("sharding", "zero1"))
    config = dataclasses.replace(TINY, mesh=mesh_config, global_batch_size=16, **changes)
    mesh = make_mesh(mesh_config)
    run = jax.jit(lambda model, batch: loss_and_gradients(model, batch, config, mesh))
    found_loss, gradients = run(tiny_model(), to_global_batch(rows, mesh))
    assert float(found_loss) == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
    assert_same_gradients(named_arrays(gradients), expected[1], way)


TERMS = LossConfig(z_loss=0.01, label_smoothing=0.1)


@pytest.mark.parametrize("rows_per_device", [None, 1])
def test_terms_of_the_loss_are_means_over_the_labelled_tokens_in_every_way(rows_per_device, rows):
    """Fused against plain gradients on 8 devices, both against jax.grad of the plain loss on one."""
    config = dataclasses.replace(
        TINY, mesh=MeshConfig(2, 4), global_batch_size=16, loss=TERMS, rows_per_device=rows_per_device
    )
    mesh = make_mesh(config.mesh)

    def reference(model, rows):
        total, num_labelled = loss(model, jax.tree.map(jnp.asarray, rows), terms=TERMS)
        return total / num_labelled

    wanted, expected = jax.jit(jax.value_and_grad(reference))(tiny_model(), rows)
    expected = {name: np.asarray(x) for name, x in named_arrays(expected).items()}
    for kind in ("fused", "plain"):
        one = dataclasses.replace(config, gradients=kind)
        run = jax.jit(lambda model, batch, one=one: loss_and_gradients(model, batch, one, mesh))
        found, gradients = run(tiny_model(), to_global_batch(rows, mesh))
        assert float(found) == pytest.approx(float(wanted), rel=LOSS_TOLERANCE)
        assert_same_gradients(named_arrays(gradients), expected, f"{kind} with terms")


def assert_same_gradients(found, expected, what):
    assert found.keys() == expected.keys()
    errors = {k: np.abs(np.asarray(found[k]) - v).max() / max(np.abs(v).max(), 1e-12) for k, v in expected.items()}
    errors.pop("vision.layers.self_attn.k_proj.bias", None)  # softmax does not depend on it: rounding alone
    worst = max(errors, key=errors.__getitem__)
    print(f"{what}: {errors[worst]:.1e} ({worst})")
    assert errors[worst] < GRADIENT_TOLERANCE


CASES = {
    "head and embedding apart, fsdp, microbatches": (TrainableConfig(), "fsdp", 1, {"tie_word_embeddings": False}),
    "decoder frozen, encoder trained": (TrainableConfig(vision=True, decoder=False), "fsdp", 1, {}),
    "plain, projector and decoder": (TrainableConfig(), "zero1", 1, {"gradients": "plain"}),
    "projector alone": (TrainableConfig(decoder=False), "zero1", None, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_trained_parts_alone(case, rows):
    trainable, sharding, rows_per_device, decoder = CASES[case]
    decoder = dict(decoder)
    gradients_kind = decoder.pop("gradients", "fused")
    model_config = dataclasses.replace(TINY.model, decoder=dataclasses.replace(TINY.model.decoder, **decoder))
    config = dataclasses.replace(
        TINY, model=model_config, trainable=trainable, mesh=MeshConfig(2, 4, sharding), global_batch_size=16,
        rows_per_device=rows_per_device, gradients=gradients_kind,
    )  # fmt: skip
    model, mesh = OpenQwen2VL(jax.random.key(0), model_config), make_mesh(config.mesh)
    found_loss, gradients = jax.jit(lambda m, b: loss_and_gradients(m, b, config, mesh))(
        model, to_global_batch(rows, mesh)
    )
    expected_loss, expected = jax.jit(jax.value_and_grad(whole_logits_loss))(model, rows)
    assert float(found_loss) == pytest.approx(float(expected_loss), rel=LOSS_TOLERANCE)
    wanted = {k: np.asarray(v) for k, v in named_arrays(expected).items() if k.split(".")[0] in trainable.parts}
    assert_same_gradients(named_arrays(gradients), wanted, case)


@pytest.mark.parametrize("change", ["nothing labelled", "no image slots"])
def test_rows_without_labels_or_images(change, rows):
    config = dataclasses.replace(TINY, mesh=MeshConfig(1, 8, "fsdp"), global_batch_size=16, rows_per_device=1)
    if change == "nothing labelled":
        rows = rows._replace(labels=np.full_like(rows.labels, IGNORE))
    else:
        is_text = rows.tokens != TINY.model.image_token_id
        rows = rows._replace(tokens=np.where(is_text, rows.tokens, 1), images=rows.images[:, :0])
    mesh = make_mesh(config.mesh)
    found_loss, gradients = jax.jit(lambda m, b: loss_and_gradients(m, b, config, mesh))(
        tiny_model(), to_global_batch(rows, mesh)
    )
    norms = {k: float(np.abs(np.asarray(v)).max()) for k, v in named_arrays(gradients).items()}
    assert all(np.isfinite(list(norms.values())))
    if change == "nothing labelled":
        assert float(found_loss) == max(norms.values()) == 0
    else:
        assert float(found_loss) == pytest.approx(float(whole_logits_loss(tiny_model(), rows)), rel=LOSS_TOLERANCE)
        assert norms["projector.fc1.kernel"] == 0 < norms["decoder.embed_tokens"]


def test_the_loss_without_gradients_is_the_same(rows, expected):
    config = dataclasses.replace(TINY, mesh=MeshConfig(2, 4, "fsdp"), global_batch_size=16, rows_per_device=1)
    mesh = make_mesh(config.mesh)
    total = jax.jit(lambda model, batch: total_loss(model, batch, config, mesh))(
        tiny_model(), to_global_batch(rows, mesh)
    )
    assert float(total) / (rows.labels != IGNORE).sum() == pytest.approx(expected[0], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("num_images", [0, 1, 8, 9, 23])
def test_the_encoder_runs_fewer_than_eight_images_too_many(num_images, monkeypatch):
    encoded = []
    real = open_qwen2vl.normalize

    def counted(images, dtype):
        jax.debug.callback(lambda: encoded.append(len(images)))
        return real(images, dtype)

    monkeypatch.setattr(open_qwen2vl, "normalize", counted)
    model = tiny_model()
    tokens = np.zeros((4, 32), np.int32)
    counts = [min(6, max(0, num_images - 6 * row)) for row in range(4)]
    for row, count in enumerate(counts):
        tokens[row, : 4 * count] = TINY.model.image_token_id
    images = jnp.zeros((4, 6, 32, 32, 3), jnp.uint8)
    jax.block_until_ready(jax.jit(lambda: model.embed(jnp.asarray(tokens), images))())
    jax.effects_barrier()
    assert num_images <= sum(encoded) <= num_images + 7


def test_the_compute_copy_rounds_matrices_only():
    copy = compute_copy(tiny_model(), dataclasses.replace(TINY, compute_dtype="bfloat16"))
    wide = {name for name, x in named_arrays(copy).items() if x.dtype == np.float32}
    assert "decoder.embed_tokens" in wide, "its gradient adds up over a token's positions"
    assert {name for name in wide if name.endswith("kernel")} == set()
