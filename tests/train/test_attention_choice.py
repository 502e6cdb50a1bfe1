"""Which attention is chosen where, and that a wrong kernel is noticed and not used."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from oq2vl_jax.config import MeshConfig
from oq2vl_jax.errors import UserError
from oq2vl_jax.model import attention as attention_module
from oq2vl_jax.sharding import make_mesh
from oq2vl_jax.train import attention_choice
from oq2vl_jax.train.attention_choice import checked_compute, choose_attention, kernel_problem
from tests.train.conftest import TINY


def mesh_of(platform, kind="NVIDIA H200"):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(devices=np.array([[device]], dtype=object))


def with_rows(num_tokens, attention="auto", head_dim=16):
    model = dataclasses.replace(TINY.model, decoder=dataclasses.replace(TINY.model.decoder, head_dim=head_dim))
    data = dataclasses.replace(TINY.data, num_tokens=num_tokens)
    return dataclasses.replace(TINY, model=model, data=data, attention=attention)


@pytest.mark.parametrize(
    ("platform", "config", "expected"),
    [
        ("cpu", with_rows(300), "xla"),
        ("cpu", with_rows(4096), "blocked"),
        ("gpu", with_rows(4096), "kernel"),
        ("gpu", with_rows(4096, head_dim=80), "blocked"),
        ("gpu", with_rows(4096, "xla"), "xla"),
        ("cpu", with_rows(4096, "kernel_interpreted"), "kernel_interpreted"),
    ],
)
def test_choice_by_device_and_rows(platform, config, expected):
    assert choose_attention(config, mesh_of(platform)).name == expected


def test_the_kernel_agrees_with_the_reference():
    assert kernel_problem(TINY, "kernel_interpreted") is None


def test_a_wrong_kernel_is_noticed(monkeypatch):
    right = attention_module.kernel_attention
    monkeypatch.setattr(attention_module, "kernel_attention", lambda q, k, v, *rest: right(q, k, 1.1 * v, *rest))
    assert "packed rows: output differs" in (kernel_problem(TINY, "kernel_interpreted") or "")


def test_a_kernel_that_fails_is_replaced_loudly(monkeypatch, capsys):
    gpu = attention_choice.Choice("kernel", "pretended GPU")
    monkeypatch.setattr(attention_choice, "choose_attention", lambda config, mesh: gpu)
    mesh = make_mesh(MeshConfig(1, 8))
    assert jax.default_backend() == "cpu", "where the kernel cannot be compiled"
    assert checked_compute(TINY, mesh).attention == "blocked"
    output = capsys.readouterr()
    assert "WARNING: attention kernel not used" in output.err
    assert "attention: blocked" in output.err


def test_the_kernel_without_a_gpu_is_one_sentence():
    with pytest.raises(UserError, match="attention = kernel needs a GPU; take auto, or kernel_interpreted"):
        choose_attention(with_rows(300, "kernel"), mesh_of("cpu"))
