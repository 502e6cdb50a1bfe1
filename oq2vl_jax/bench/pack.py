"""Measures packing end to end, from tars of JPEGs to rows, against the published code's approach in the same run.

The published packer (mm_sequence_packing/sequence_packing_image_to_json.py there) was rebuilt here from its
description, independently of our packer: decode each image, encode it again as JPEG and base64, tokenise, first-fit
decreasing with a sum over the bin in its inner loop, and one indented JSON file per row. As in the published code, a
data-loader process decodes each sample and hands it over. Both packers use all workers, one tar per worker at a time.
"""

import base64
import functools
import io
import json
import multiprocessing
import os
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.bench.photo_shards import write_photo_shards
from oq2vl_jax.bounds import Seed, SmallCount, Workers
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.errors import UserError

NUM_TOKENS, VISUAL_TOKENS = 4096, 144


@dataclass(frozen=True)
class Pack:
    """Samples per second from tars to packed rows, by our packer and by the published approach."""

    tokenizer: str
    """Hugging Face tokenizer folder."""
    num_shards: SmallCount = 6
    samples_per_shard: SmallCount = 10_000
    """As in DataComp."""
    num_workers: Workers = os.cpu_count() or 1
    seed: Seed = 0
    json: bool = False


OPTIONS = Pack


def measure(config: Pack) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_photo_shards(folder, config.num_shards, config.samples_per_shard, config.seed)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        TextCodec.from_transformers(config.tokenizer).save(tokenizer)
        ours = pack_ours(config, str(tokenizer), folder)
        theirs = pack_as_published(config, str(tokenizer), shards, folder)
        check_image_bytes(shards, folder)
    samples = config.num_shards * config.samples_per_shard
    results = [("ours", ours), ("published approach", theirs)]
    return [
        {"packer": name, "samples": samples, "seconds": seconds, "samples_per_second": samples / seconds,
         "times_published": theirs / seconds}
        for name, seconds in results
    ]  # fmt: skip


def pack_ours(config: Pack, tokenizer: str, folder: Path) -> float:
    from oq2vl_jax.data.packing.packer import PackConfig, pack_shards
    from oq2vl_jax.jobs import Execution

    start = time.perf_counter()
    pack_shards(
        PackConfig(
            shards=f"{folder}/*.tar",
            out=str(folder / "ours"),
            tokenizer=tokenizer,
            template="plain",
            execution=Execution(num_workers=config.num_workers),
        )
    )
    return time.perf_counter() - start


def pack_as_published(config: Pack, tokenizer: str, shards: list[str], folder: Path) -> float:
    (folder / "published").mkdir()
    work = functools.partial(pack_shard_as_published, tokenizer, folder / "published")
    start = time.perf_counter()
    with ProcessPoolExecutor(config.num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(work, shards))
    return time.perf_counter() - start


def pack_shard_as_published(tokenizer_folder: str, out: Path, shard: str) -> None:
    """Packs one tar: a data-loader process decodes the samples; this process collects, places and writes them."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=2)
    loader = context.Process(target=load_as_published, args=(tokenizer_folder, shard, queue))
    loader.start()
    documents, lengths = {}, {}
    while (loaded := queue.get()) is not None:
        documents[loaded["key"]], lengths[loaded["key"]] = loaded, loaded["length"]
    loader.join()
    bins: list[list[tuple[str, int]]] = []
    for item in sorted(lengths.items(), key=lambda item: item[1], reverse=True):
        for candidate in bins:
            if sum(length for _, length in candidate) + item[1] <= NUM_TOKENS:
                candidate.append(item)
                break
        else:
            bins.append([item])
    for row in bins:
        content = {"data": [documents[key] for key, _ in row], "lengths": [length for _, length in row]}
        (out / f"{uuid.uuid4().hex}_packed.json").write_text(json.dumps(content, indent=2))


def load_as_published(tokenizer_folder: str, shard: str, queue) -> None:
    import tarfile

    from PIL import Image
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    sample: dict = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            file = tar.extractfile(member)
            sample[suffix] = file.read() if file else b""
            if len(sample) < 3:  # jpg, txt, json
                continue
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            text = sample["txt"].decode()
            num_tokens = sum(len(tokenizer(piece).input_ids) for piece in ("", f"\n{text}"))
            queue.put({"image_info": [{"image_base64": encoded}, None], "texts": [None, text], "key": key,
                       "uid": json.loads(sample["json"])["key"], "length": VISUAL_TOKENS + 2 + num_tokens})  # fmt: skip
            sample = {}
    queue.put(None)


def check_image_bytes(shards: list[str], folder: Path) -> None:
    """Raises UserError unless every image in our rows equals the input's, byte for byte."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    from oq2vl_jax.data.packing.rows import decode_row
    from oq2vl_jax.data.samples.tars import read_members

    files = sorted(str(file) for file in (folder / "ours").glob("*.array_record"))
    for shard, file in zip(shards, files, strict=True):
        source = ArrayRecordDataSource([file])
        rows = (decode_row(source[i]) for i in range(len(source)))
        packed = {key: image for row in rows for key, image in zip(row.keys, row.images, strict=True)}
        if packed != {members.key: members.files["jpg"] for members in read_members(shard)}:
            raise UserError(f"the images in {file} are not those of {shard}: this is a bug, please report it.")
