"""Open-Qwen2VL (arXiv 2504.00595) in JAX.

How data flows, one line per arrow:

    WebDataset .tar   --curate/score-->    scores     one parquet per tar; optional, as the next two are
    scores, metadata  --curate/filter-->   uid set    samples that an expression over rules keeps, and a report
    uid set, .tar     --curate/reshard-->  .tar       the kept samples, bytes unchanged
    WebDataset .tar   --data/samples-->    Sample     bytes and text of one key
    Sample            --data/text-->       Document   token ids, loss mask, encoded images
    Documents         --data/packing-->    rows       under a token budget and an image budget
    rows              --data/pack-->       ArrayRecord shards and a manifest, written once, offline
    ArrayRecord       --data/loading-->    Batch      uint8 images, tokens, labels, positions, segment ids
    Batch, TrainState --train/step-->      TrainState parameters and optimizer state, sharded over the mesh
    TrainState        --checkpoint->       an Orbax step folder with loader state, config and tokenizer
    Orbax step        --generate-->        answers

Axis legend, used in einsum strings, annotations and drawings all over the package:

    B rows in the batch      T tokens in a row (queries)   S tokens attended to     V vocabulary
    D model width            N query heads                 K kv heads               G = N // K
    H head width             F feed-forward width          I image slots            P patches per image
    M visual tokens per image                              L layers
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oq2vl_jax.interface import LoadedModel, batch_of, load

__all__ = ["LoadedModel", "batch_of", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python interface (interface.py) when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module oq2vl_jax has no {name!r}")
    from importlib import import_module

    return getattr(import_module("oq2vl_jax.interface"), name)
