"""Packs tars and instruction files into rows: the options, the work of one task, and the manifest."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oq2vl_jax.bounds import Count, Length, SmallCount, check_bounds
from oq2vl_jax.config import Template
from oq2vl_jax.errors import UserError
from oq2vl_jax.jobs import Execution, Job, counted, make_tasks, read_settings, run_job, write_manifest

if TYPE_CHECKING:
    from oq2vl_jax.data.samples.formats.format import Reading
    from oq2vl_jax.data.samples.uids import UidSet

LENGTH_BIN = 64
"""Width of the bins of the length histogram, in tokens."""
TOTALS = ("rows", "documents", "images", "tokens", "samples")
FILE_FIELDS = ("file", "rows", "inputs", "bytes", "sample_xxh3", "xxh3")
COUNTERS = ("skipped", "notes", "images_per_row", "documents_per_row", "document_tokens")


@dataclass(frozen=True)
class PackConfig:
    """Packs WebDataset tars (captions, conversations, interleaved) and instruction files into rows for training."""

    shards: str
    """Tars ('DIR/{00000..00009}.tar', a glob, or one path; local or s3://, gs://), *_packed.json files, or instruction
    files (a LLaVA-style JSON list or .jsonl)."""
    out: str
    """Folder for the rows, manifest.json and the tokenizer."""
    tokenizer: str
    """Hugging Face tokenizer folder."""
    num_tokens: Length = 4096
    """Token budget of a row."""
    max_images: SmallCount = 28
    """Image budget of a row."""
    visual_tokens: Length = 144
    """Tokens per image; the model's num_visual_tokens."""
    template: Template = "open_qwen2vl"
    """Template of conversations; captions are always plain."""
    broken_shards: Literal["stop", "keep"] = "stop"
    """stop: a tar that is cut off is an error. keep: its whole samples are packed, and the tar is counted."""
    files_per_task: Count = 1
    """Input files packed together into one file of rows. Published *_packed.json files hold one row each: take 1000."""
    images: str | None = None
    """Folder of the pictures that an instruction file, or a parquet file, names."""
    columns: tuple[str, ...] = ()
    """Columns of parquet files: image=jpg text=caption id=key. Without it the schema says."""
    long_documents: Literal["auto", "skip", "cut"] = "auto"
    """Interleaved documents that are longer than a row. skip: counted out, and so are those of more than 9 pictures, as
    in the published code. cut: between their parts. auto: cut in parquet files, skip elsewhere."""
    uids: str | None = None
    """Set of ids (curate.filter): samples that are not in it are left out, and counted."""
    without_uids: str | None = None
    """Set of ids (curate.overlap): samples that are in it are left out, and counted."""
    entries_per_task: Count = 2000
    """Entries of an instruction file packed together into one file of rows."""
    unmarked_images: Literal["first", "skip"] = "first"
    """Conversations whose pictures no <image> places. first: they come before the question, and are noted. skip: such a
    sample is counted out."""
    report: bool = False
    """Write OUT/report.html as well: fill, images and documents per row, lengths."""
    execution: Execution = Execution()

    @property
    def settings(self) -> dict:
        """Options that the written bytes depend on, besides the input and the tokenizer."""
        from oq2vl_jax.data.packing.rows import FORMAT_VERSION

        names = ("num_tokens", "max_images", "visual_tokens", "template", "files_per_task")
        named = {name: getattr(self, name) for name in names}
        named |= {"unmarked_images": "skip"} if self.unmarked_images == "skip" else {}
        named |= {"columns": sorted(self.columns)} if self.columns else {}
        for name in ("uids", "without_uids"):
            path = getattr(self, name)
            named |= {name: load_uids(path).sha256()} if path else {}
        named |= {"long_documents": self.long_documents} if self.long_documents != "auto" else {}
        return {"format": FORMAT_VERSION} | named | ({"images_folder": self.images} if self.images else {})

    @property
    def reading(self) -> "Reading":
        from oq2vl_jax.data.samples.formats.format import Reading

        return Reading(self.images, self.columns)


def pack_shards(config: PackConfig) -> dict | None:
    """Packs every shard and returns the manifest; None while other ranks are at work. Raises UserError."""
    from oq2vl_jax import paths

    check_config(config)
    files = paths.expand_paths("--shards", config.shards)
    settings = config.settings | save_tokenizer(config)
    job = Job(
        out=config.out,
        name="rows-",
        suffix=".array_record",
        settings=settings,
        work=functools.partial(pack_files, config, settings["tokenizer_sha256"]),
        progress="{documents} documents in {rows} rows",
        broken_shards=config.broken_shards,
        version_beside=functools.partial(version_of_pictures, config.reading),
    )
    inputs, per_task = list_inputs(config, files)
    reports = run_job(job, make_tasks(inputs, per_task), config.execution)
    if reports is None:
        return None
    manifest = make_manifest(settings, reports)
    if config.report:
        from oq2vl_jax.data.packing.report import write_report

        write_report(paths.join(config.out, "report.html"), manifest)
    write_manifest(job, manifest)
    return manifest


def version_of_pictures(reading: "Reading", inputs: tuple[str, ...]) -> str:
    from oq2vl_jax.data.samples.formats import version_beside

    return version_beside(inputs, reading)


def list_inputs(config: PackConfig, files: list[str]) -> tuple[list[str], int]:
    """Returns (inputs, inputs per task): files, or parts of files. Raises UserError for a format that is split
    beside another."""
    from oq2vl_jax.data.samples.formats import format_name, formats
    from oq2vl_jax.data.samples.ids import check_distinct

    splits = {name: formats()[name].split for name in dict.fromkeys(map(format_name, files))}
    if len(splits) > 1 and any(split is not None for split in splits.values()):
        raise UserError(f"--shards {config.shards}: {' and '.join(splits)} together; pack them one by one.")
    for name in splits:
        if config.columns and not formats()[name].takes_columns:
            raise UserError(f"--columns does not apply to {name}; parquet files have columns.")
    check = formats()[format_name(files[0])].check
    if check is not None:
        check(files[0], config.reading)
    split = next(iter(splits.values()))
    unused = "entries_per_task" if split is None else "files_per_task"
    if getattr(config, unused) != getattr(PackConfig, unused):
        raise UserError(
            f"--{unused.replace('_', '-')} does not apply to {next(iter(splits))}, which are packed "
            f"{'by files: --files-per-task' if split is None else 'by entries: --entries-per-task'}."
        )
    if (config.uids or config.without_uids) and formats()[format_name(files[0])].takes_columns:
        check_distinct(files)
    if split is None:
        return files, config.files_per_task
    return [part for file in files for part in split(file, config.entries_per_task)], 1


def check_config(config: PackConfig) -> None:
    from oq2vl_jax import paths
    from oq2vl_jax.config import check_square

    paths.check_out(config.out)
    check_bounds(config, as_flags=True)
    check_square("--visual-tokens", config.visual_tokens)


def save_tokenizer(config: PackConfig) -> dict:
    """Writes OUT/tokenizer, unless OUT was packed with another one; returns its identity for the settings."""
    import tempfile

    from oq2vl_jax import paths
    from oq2vl_jax.data.text.codec import TextCodec
    from oq2vl_jax.data.text.tokenizer import tokenizer_sha256

    codec = TextCodec.load(config.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        codec.save(Path(folder))
        identity = tokenizer_sha256(Path(folder))
        settings_file = paths.join(config.out, "settings.json")
        if not paths.exists(settings_file) or read_settings(config.out).get("tokenizer_sha256") == identity:
            paths.write_folder(Path(folder), paths.join(config.out, "tokenizer"))
    return {
        "tokenizer_sha256": identity,
        "vocab_size": codec.vocab_size,
        "pad_id": codec.special.pad,
        "image_id": codec.special.image,
    }


@functools.lru_cache(maxsize=2)
def load_uids(path: str) -> "UidSet":
    """Loads a set of ids once per worker process."""
    from oq2vl_jax.data.samples.uids import UidSet

    return UidSet.load(path)


def selection_of(config: PackConfig) -> Callable[[str | None], str | None]:
    """Returns the function from a sample's id to the reason why it is left out by --uids or --without-uids, or None."""
    from oq2vl_jax.data.samples.ids import parse_uid

    wanted, unwanted = (load_uids(path) if path else None for path in (config.uids, config.without_uids))

    def reason(text: str | None) -> str | None:
        uid = parse_uid(text)
        if wanted is not None and (uid is None or not wanted.count(*uid)):
            return "not_in_uids"
        return "in_without_uids" if unwanted is not None and uid is not None and unwanted.count(*uid) else None

    return reason


@functools.lru_cache(maxsize=1)
def load_codec(folder: str, tokenizer_sha256: str):
    """Loads the saved tokenizer once per worker process; the hash makes it reload a folder that was rewritten."""
    from oq2vl_jax import paths
    from oq2vl_jax.data.text.codec import TextCodec

    del tokenizer_sha256
    return TextCodec.from_saved(paths.read_text(paths.join(folder, "tokenizer.json")), folder)


def pack_files(config: PackConfig, tokenizer_sha256: str, files: tuple[str, ...], target: Path) -> dict:
    """Packs the documents of some files into the rows of `target`; returns the report."""
    from oq2vl_jax import paths
    from oq2vl_jax.data.packing.bins import pack_rows
    from oq2vl_jax.data.packing.documents import Limits, read_documents
    from oq2vl_jax.data.packing.rows import pack_documents, write_rows
    from oq2vl_jax.digests import digest_of, sample_of_file

    limits = Limits(config.template, config.num_tokens, config.max_images, config.visual_tokens,
        config.unmarked_images, config.long_documents)  # fmt: skip
    codec = load_codec(paths.join(config.out, "tokenizer"), tokenizer_sha256)
    documents, counts = read_documents(files, codec, limits, config.broken_shards, config.reading, selection_of(config))
    tokens = [len(document.tokens) for document in documents]
    images = [len(document.images) for document in documents]
    rows = pack_rows(tokens, images, config.num_tokens, config.max_images)
    write_rows(target, (pack_documents([documents[i] for i in row]) for row in rows))
    (num_bytes, digest), (_, sample) = digest_of(target), sample_of_file(target)
    return {
        "bytes": num_bytes,
        "sample_xxh3": sample,
        "xxh3": digest,
        "rows": len(rows),
        "documents": len(documents),
        "images": sum(images),
        "tokens": sum(tokens),
        **counts,
        "images_per_row": histogram(sum(images[i] for i in row) for row in rows),
        "documents_per_row": histogram(len(row) for row in rows),
        "document_tokens": histogram(length // LENGTH_BIN * LENGTH_BIN for length in tokens),
    }


def histogram(values) -> dict[str, int]:
    """Counts the values; keys are strings, as JSON requires."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def make_manifest(settings: dict, reports: list[dict]) -> dict:
    totals = {name: sum(report[name] for report in reports) for name in TOTALS}
    counters = {name: sum((Counter(report[name]) for report in reports), Counter()) for name in COUNTERS}
    if not totals["rows"]:
        raise UserError(
            f"no sample could be packed (skipped: {counted(counters['skipped'])}); check the shards and the limits."
        )
    return {
        **totals,
        "token_fill": totals["tokens"] / (totals["rows"] * settings["num_tokens"]),
        "image_fill": totals["images"] / (totals["rows"] * settings["max_images"]),
        **{name: dict(sorted(counter.items(), key=by_number)) for name, counter in counters.items()},
        **settings,
        "files": [{name: report[name] for name in FILE_FIELDS if name in report} for report in reports],
    }


def by_number(item: tuple[str, int]) -> tuple[int, str]:
    return (int(item[0]) if item[0].isdigit() else -1, item[0])
