"""python -m oq2vl_jax.data.pack: WebDataset tars to packed ArrayRecord rows.

One task is one tar: read, check every image, tokenise, place (data/packing.py), write rows-NNNNN.array_record beside
a small report. The written bytes depend on the input and the settings only, not on the number of workers; finished
tars are skipped when the same command runs again. OUT/manifest.json appears last, when everything is whole.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oq2vl_jax.config import Template
from oq2vl_jax.errors import UserError, run_command


@dataclass(frozen=True)
class PackConfig:
    """WebDataset tars (captions or conversations) to packed rows for oq2vl_jax.train."""

    shards: str
    """Tars: 'DIR/{00000..00009}.tar', a glob, or one path."""
    out: str
    """Folder for the rows, manifest.json and the tokenizer."""
    tokenizer: str
    """Hugging Face tokenizer folder."""
    num_tokens: int = 4096
    """Token budget of a row."""
    max_images: int = 28
    """Image budget of a row."""
    visual_tokens: int = 144
    """Tokens an image takes; the model's num_visual_tokens."""
    template: Template = "open_qwen2vl"
    """How conversations are written; captions are always plain."""
    num_workers: int = os.cpu_count() or 1
    broken_shards: Literal["stop", "keep"] = "stop"
    """A tar that is cut off: stop with an error, or keep its whole samples and count it."""

    @property
    def settings(self) -> dict:
        """What the written bytes depend on, next to the input."""
        from oq2vl_jax.data.rows import FORMAT_VERSION

        names = ("num_tokens", "max_images", "visual_tokens", "template")
        return {"format": FORMAT_VERSION} | {name: getattr(self, name) for name in names}


@dataclass
class ShardReport:
    """What became of one tar."""

    shard: str
    file: str
    rows: int = 0
    documents: int = 0
    images: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: Counter = dataclasses.field(default_factory=Counter)


def pack_shards(config: PackConfig) -> dict:
    """Packs every shard and returns the manifest. Raises UserError for what the user caused."""
    from oq2vl_jax.data.shards import expand_shards
    from oq2vl_jax.data.text import TextCodec, tokenizer_sha256

    check_config(config)
    shards = expand_shards(config.shards)
    out = Path(config.out)
    codec = TextCodec(config.tokenizer)
    saved_tokenizer = out / f"tokenizer.{os.getpid()}.partial"
    codec.save(saved_tokenizer)
    settings = config.settings | {
        "tokenizer_sha256": tokenizer_sha256(saved_tokenizer),
        "vocab_size": codec.vocab_size,
        "pad_id": codec.special.pad,
        "image_id": codec.special.image,
    }
    try:
        check_out_is_ours(out, settings)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        os.rename(saved_tokenizer, out / "tokenizer")
    finally:
        shutil.rmtree(saved_tokenizer, ignore_errors=True)
    (out / "manifest.json").unlink(missing_ok=True)  # a manifest says that everything is whole
    write_atomically(out / "settings.json", json.dumps(settings, indent=2) + "\n")
    tasks = list(enumerate(shards))
    pack = functools.partial(pack_shard, config, settings)
    reports = list(show_progress(run_tasks(pack, tasks, min(config.num_workers, len(tasks))), len(tasks)))
    manifest = make_manifest(settings, reports)
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def check_config(config: PackConfig) -> None:
    from oq2vl_jax.config import check_square

    check_square("--visual-tokens", config.visual_tokens)
    for name in ("num_tokens", "max_images", "num_workers"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")


def check_out_is_ours(out: Path, settings: dict) -> None:
    """A folder packed with other settings is neither mixed with nor overwritten."""
    if (out / "settings.json").exists():
        there = json.loads((out / "settings.json").read_text())
        changed = [
            f"{key}: {there.get(key)} there, {value} now" for key, value in settings.items() if there.get(key) != value
        ]
        if changed:
            raise UserError(
                f"--out {out} holds rows packed with other settings ({'; '.join(changed)}); choose another folder."
            )


def run_tasks(function, tasks, num_workers: int):
    """Results in the order of the tasks. Workers are spawned: the parent may hold threads."""
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, tasks)
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, perhaps for want of memory; try fewer --num-workers.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def show_progress(reports, total: int):
    """A progress bar on a terminal, a plain line per shard otherwise (stderr)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(reports, description="packing", total=total, console=Console(stderr=True))
        return
    for i, report in enumerate(reports):
        print(
            f"packed {i + 1}/{total}: {report.shard}: {report.documents} documents in {report.rows} rows",
            file=sys.stderr,
        )
        yield report


def pack_shard(config: PackConfig, settings: dict, task: tuple[int, str]) -> ShardReport:
    """Packs one tar, or returns the report of an earlier run that finished it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from oq2vl_jax.data.packing import first_fit_decreasing
    from oq2vl_jax.data.rows import WRITER_OPTIONS, encode_row, pack_documents

    index, shard = task
    report = ShardReport(shard, f"rows-{index:05d}.array_record")
    target, report_file = Path(config.out) / report.file, Path(config.out) / f"rows-{index:05d}.json"
    identity = task_identity(config, settings, shard)
    if report_file.exists() and target.exists():
        finished = json.loads(report_file.read_text())
        if finished.pop("identity") == identity:
            return ShardReport(**finished | {"skipped": Counter(finished["skipped"])})
    documents = read_documents(config, shard, report)
    rows = first_fit_decreasing(
        [len(document.tokens) for document in documents],
        [len(document.images) for document in documents],
        config.num_tokens,
        config.max_images,
    )
    partial = target.with_suffix(".partial")
    writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
    for row in rows:
        writer.write(encode_row(pack_documents([documents[i] for i in row])))
    writer.close()
    os.replace(partial, target)
    report.rows, report.documents = len(rows), len(documents)
    report.images = sum(len(document.images) for document in documents)
    report.tokens = sum(len(document.tokens) for document in documents)
    write_atomically(report_file, json.dumps(vars(report) | {"identity": identity}))
    return report


def task_identity(config: PackConfig, settings: dict, shard: str) -> str:
    """Changes whenever a finished shard has to be packed again."""
    status = os.stat(shard)
    parts = [settings, os.path.abspath(shard), status.st_size, status.st_mtime_ns, config.broken_shards]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_documents(config: PackConfig, shard: str, report: ShardReport) -> list:
    """The documents of a tar that fit a row; every other sample is counted in report.skipped."""
    from oq2vl_jax.data.images import ImageError, check_image
    from oq2vl_jax.data.shards import CutOffError, read_shard
    from oq2vl_jax.data.text import SampleError

    codec = load_codec(config.tokenizer)
    documents = []
    try:
        for sample in read_shard(shard):
            report.samples += 1
            try:
                document = codec.document(sample, config.template, config.visual_tokens)
                check_fits(document, config)
                for image in sample.images:
                    check_image(image)
            except (SampleError, ImageError) as problem:
                report.skipped[problem.reason] += 1
                continue
            documents.append(document)
    except CutOffError:
        if config.broken_shards == "stop":
            raise
        report.skipped["shard_cut_off"] += 1
    return documents


def check_fits(document, config: PackConfig) -> None:
    from oq2vl_jax.data.text import SampleError

    if len(document.tokens) > config.num_tokens:
        raise SampleError("too_many_tokens")
    if len(document.images) > config.max_images:
        raise SampleError("too_many_images")
    if not document.is_labelled.any():
        raise SampleError("nothing_labelled")


@functools.lru_cache(maxsize=1)
def load_codec(folder: str):
    """One tokenizer per worker process."""
    from oq2vl_jax.data.text import TextCodec

    return TextCodec(folder)


def make_manifest(settings: dict, reports: list[ShardReport]) -> dict:
    totals = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("rows", "documents", "images", "tokens", "samples")
    }
    skipped = sum((report.skipped for report in reports), Counter())
    if not totals["rows"]:
        raise UserError(f"no sample could be packed; skipped: {dict(skipped)}.")
    return {
        **totals,
        "token_fill": totals["tokens"] / (totals["rows"] * settings["num_tokens"]),
        "image_fill": totals["images"] / (totals["rows"] * settings["max_images"]),
        "skipped": dict(sorted(skipped.items())),
        **settings,
        "files": [{"file": report.file, "rows": report.rows, "shard": report.shard} for report in reports],
    }


def write_atomically(path: Path, text: str) -> None:
    """Written beside and renamed: a killed run leaves the old file or the new, never half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> None:
    import tyro

    config = tyro.cli(PackConfig, prog="python -m oq2vl_jax.data.pack")
    manifest = pack_shards(config)
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items()) or "none"
    print(
        f"{manifest['documents']} documents in {manifest['rows']} rows, token fill {manifest['token_fill']:.3f}, "
        f"image fill {manifest['image_fill']:.3f}; skipped: {skipped}. Manifest: {config.out}/manifest.json"
    )


if __name__ == "__main__":
    run_command(main)
