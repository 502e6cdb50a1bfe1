"""python -m oq2vl_jax.curate.overlap SOURCE.. --tasks DIR --out OUT: training pictures that are a benchmark's.

A training picture overlaps if its bytes are those of a benchmark's picture, or if their perceptual hashes differ in at
most --max-distance of 64 bits (fingerprints.py). Writes

    OUT/uids.npy      ids of the samples that overlap: a filter leaves them out by `.. - uids(OUT/uids.npy)`
    OUT/report.json   per benchmark: pictures, how many a training picture matches, and which; the evaluation reads it
    OUT/report.html   pairs to look at

jobs.py describes how tasks are run, resumed and spread over machines.
"""

import functools
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from oq2vl_jax.bounds import Between, Count, parse
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.jobs import Execution, Job, make_tasks, run_job, write_manifest

SHOWN = 60
THUMBNAIL = (220, 220)
Bits = Annotated[int, Between(0, 64)]


@dataclass(frozen=True)
class OverlapConfig:
    """Finds training pictures that are, or nearly are, pictures of a benchmark."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Tars, parquet files or instruction files, as oq2vl_jax.data.pack takes them."""
    tasks: str
    """Folder with the benchmarks' files, as --data of oq2vl_jax.eval."""
    out: str
    """Folder for uids.npy, report.json and report.html."""
    names: str | None = None
    """Benchmarks, separated by commas; default: all that have files in the folder."""
    max_distance: Bits = 6
    """Bits of 64 in which two pictures' perceptual hashes may differ; 0 finds little more than the same bytes."""
    images: str | None = None
    """Folder of the pictures that the sources name."""
    columns: tuple[str, ...] = ()
    """Columns of parquet files: image=jpg text=caption."""
    entries_per_task: Count = 2000
    """Entries of an instruction file that one task reads."""
    broken_shards: Literal["stop", "keep"] = "stop"
    """For a tar that is cut off: stop with an error, or keep its complete samples and count the tar."""
    execution: Execution = Execution()


def find_overlap(config: OverlapConfig) -> dict | None:
    """Writes the files of --out and returns the report; None while other ranks have tasks left. Raises UserError."""
    from oq2vl_jax import paths
    from oq2vl_jax.curate.fingerprints import check_has_imagehash
    from oq2vl_jax.data.samples.formats import parts_of

    check_has_imagehash("oq2vl_jax.curate.overlap")
    paths.check_out(config.out)
    files = [file for source in config.sources for file in paths.expand_paths("SOURCE", source)]
    check_sources(config, files)
    pictures = benchmark_pictures(config)
    paths.make_folder(config.out)
    settings = {
        "max_distance": config.max_distance,
        "benchmarks": {name: digest for name, (digest, _) in pictures.items()},
        **({"columns": sorted(config.columns)} if config.columns else {}),
        **({"images_folder": config.images} if config.images else {}),
    }
    save_index(config.out, pictures)
    inputs = [part for file in files for part in parts_of(file, config.entries_per_task)]
    job = Job(
        out=config.out, name="matches-", suffix=".jsonl", settings=settings,
        work=functools.partial(match_file, config), progress="{matched} of {pictures} pictures overlap",
        broken_shards=config.broken_shards, version_beside=functools.partial(version_of_pictures, config),
    )  # fmt: skip
    reports = run_job(job, make_tasks(inputs), config.execution)
    if reports is None:
        return None
    report = settings | summed(config, reports, pictures)
    write_manifest(job, report)
    return report


def check_sources(config: OverlapConfig, files: list[str]) -> None:
    """Raises UserError for files that cannot be read so, or whose samples would share ids."""
    from oq2vl_jax.data.samples.formats import format_of
    from oq2vl_jax.data.samples.ids import check_distinct

    if config.columns and not all(format_of(file).takes_columns for file in files):
        raise UserError("--columns does not apply to every source; parquet files have columns.")
    for format in {format_of(file): file for file in reversed(files)}.items():
        if format[0].check is not None:
            format[0].check(format[1], reading_of(config))
    check_distinct([file for file in files if format_of(file).takes_columns])


def reading_of(config: OverlapConfig) -> Any:
    from oq2vl_jax.data.samples.formats.format import Reading

    return Reading(config.images, config.columns)


def version_of_pictures(config: OverlapConfig, inputs: tuple[str, ...]) -> str:
    from oq2vl_jax.data.samples.formats import version_beside

    return version_beside(inputs, reading_of(config))


def benchmark_pictures(config: OverlapConfig) -> dict[str, tuple[str, list[tuple[str, bytes]]]]:
    """Returns name -> (digest of its files, [(index of the item, a picture)]). Raises UserError if there is none."""
    from oq2vl_jax.eval.benchmarks import TASKS, find_benchmark
    from oq2vl_jax.eval.evaluate import read_items
    from oq2vl_jax.eval.tables import find_files, sha256_of

    asked = [name.strip() for name in config.names.split(",")] if config.names else None
    unknown = [name for name in asked or () if name not in TASKS]
    if unknown:
        raise UserError(f"--names: no benchmark {unknown[0]!r}; there are {', '.join(TASKS)}.")
    found = {}
    for name in asked or TASKS:
        try:
            files = find_files(config.tasks, name, find_benchmark(name).files)
        except UserError:
            if asked or not Path(config.tasks).is_dir():
                raise
            continue
        held = {(image): item.index for item in reversed(read_items(name, files)) for image in item.images}
        found[name] = (sha256_of(files), [(index, image) for image, index in reversed(held.items())])
    if not found:
        raise UserError(f"--tasks {config.tasks}: no files of a benchmark here; there are {', '.join(TASKS)}.")
    return found


def save_index(out: str, pictures: dict[str, tuple[str, list[tuple[str, bytes]]]]) -> None:
    """Writes OUT/benchmarks.npz, the fingerprints that every task searches, and OUT/benchmarks.json, whose they are."""
    from oq2vl_jax import paths
    from oq2vl_jax.curate.fingerprints import Index, fingerprint

    owners = [[name, index] for name, (_, held) in pictures.items() for index, _ in held]
    index = Index([fingerprint(image, is_cropped_too=True) for _, held in pictures.values() for _, image in held])
    buffer = io.BytesIO()
    index.save(buffer)
    with paths.whole_output(paths.join(out, "benchmarks.npz")) as partial:
        partial.write_bytes(buffer.getvalue())
    paths.write_text(paths.join(out, "benchmarks.json"), json.dumps(owners))


@functools.lru_cache(maxsize=1)
def load_index(out: str) -> tuple[Any, list[list[str]]]:
    """Loads the index once per worker process."""
    from oq2vl_jax import paths
    from oq2vl_jax.curate.fingerprints import Index

    with paths.open_input(paths.join(out, "benchmarks.npz")) as file:
        return Index.load(file), paths.read_json(paths.join(out, "benchmarks.json"))  # pyright: ignore[reportArgumentType]


def match_file(config: OverlapConfig, files: tuple[str, ...], target: Path) -> dict:
    """Writes a line for each training picture of an input that overlaps; returns the report."""
    from oq2vl_jax.curate.fingerprints import fingerprint
    from oq2vl_jax.data.samples.chats import with_turns
    from oq2vl_jax.data.samples.formats import format_of
    from oq2vl_jax.data.samples.tars import CutOffError

    index, owners = load_index(config.out)
    counts, skipped, lines = Counter(), Counter(), []
    try:
        for sample in format_of(files[0]).read(files[0], reading_of(config)):
            counts["samples"] += 1
            if sample.problem:
                skipped[sample.problem] += 1
            for number, image in enumerate(with_turns(sample).images):  # with those that a message holds
                counts["pictures"] += 1
                matches = index.find(fingerprint(image), config.max_distance)
                counts["matched"] += bool(matches)
                for match in matches:
                    task, item = owners[match.position]
                    lines.append(
                        {"key": sample.key, "uid": sample.uid, "picture": number, "task": task, "item": item,
                         "distance": match.distance, "position": match.position,
                         "thumbnail": thumbnail(image) if len(lines) < SHOWN else None}
                    )  # fmt: skip
    except CutOffError:
        if config.broken_shards == "stop":
            raise
        skipped["shard_cut_off"] += 1
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: counts[name] for name in ("samples", "pictures", "matched")} | {"skipped": dict(skipped)}


def thumbnail(data: bytes) -> str | None:
    """Returns a small JPEG in base64, for the page; None for a picture that does not decode."""
    import base64

    from oq2vl_jax.data.samples.images import ImageError, open_rgb

    try:
        image, buffer = open_rgb(data), io.BytesIO()
    except ImageError:
        return None
    image.thumbnail(THUMBNAIL)
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def summed(config: OverlapConfig, reports: list[dict], pictures: dict) -> dict[str, Any]:
    """Writes uids.npy and the page; returns the totals and, per benchmark, what overlaps."""
    from oq2vl_jax import paths
    from oq2vl_jax.data.samples.ids import parse_uid
    from oq2vl_jax.data.samples.uids import UidSet

    lines = [
        json.loads(line)
        for report in reports
        for line in paths.read_text(paths.join(config.out, report["file"])).splitlines()
    ]
    uids = {uid for line in lines if (uid := parse_uid(line["uid"])) is not None}
    high, low = [high for high, _ in uids], [low for _, low in uids]
    UidSet(high, low).unique().save(paths.join(config.out, "uids.npy"))
    benchmarks = {}
    for name, (digest, held) in pictures.items():
        own = [line for line in lines if line["task"] == name]
        benchmarks[name] = {
            "data_sha256": digest,
            "pictures": len(held),
            "overlapping": len({line["position"] for line in own}),
            "same_bytes": len({line["position"] for line in own if line["distance"] < 0}),
            "training_pictures": len(own),
            "items": sorted({line["item"] for line in own}),
        }
    totals: dict[str, Any] = {name: sum(report[name] for report in reports)
                              for name in ("samples", "pictures", "matched")}  # fmt: skip
    totals["skipped"] = dict(sorted(sum((Counter(report["skipped"]) for report in reports), Counter()).items()))
    without_id = sum(parse_uid(line["uid"]) is None for line in lines)
    report = totals | {"uids": len(uids), "matches_without_id": without_id, "max_distance": config.max_distance,
                       "sources": list(config.sources), "benchmarks": benchmarks}  # fmt: skip
    paths.write_text(paths.join(config.out, "report.json"), json.dumps(report, indent=2) + "\n")
    write_page(config, report, lines, pictures)
    return report


def write_page(config: OverlapConfig, report: dict, lines: list[dict], pictures: dict) -> None:
    import base64

    from oq2vl_jax import paths
    from oq2vl_jax.data.samples.thumbnail import picture
    from oq2vl_jax.html import page, table

    held = [image for _, images in pictures.values() for _, image in images]
    rows = [(name, of["pictures"], of["overlapping"], of["same_bytes"], of["training_pictures"])
            for name, of in report["benchmarks"].items()]  # fmt: skip
    body = [table(["benchmark", "pictures", "overlap", "same bytes", "training pictures"], rows)]
    seen = sorted((line for line in lines if line["thumbnail"]), key=lambda line: -line["distance"])[:SHOWN]
    body.append(f"<h2>{len(seen)} pairs, the least alike first</h2>")
    body.append('<div class="sheet">')
    for line in seen:
        how = "the same bytes" if line["distance"] < 0 else f"{line['distance']} of 64 bits differ"
        body.append(picture(base64.b64decode(line["thumbnail"]), f"training: {line['key']}", how))
        body.append(picture(held[line["position"]], f"{line['task']}: {line['item']}"))
    body.append("</div>")
    lead = (
        f"{report['matched']:,} of {report['pictures']:,} training pictures overlap with a benchmark, by bytes or "
        f"by at most {config.max_distance} of 64 bits of pHash."
    )
    paths.write_text(paths.join(config.out, "report.html"), page("Overlap with benchmarks", lead, body))


def main() -> None:
    config = parse(OverlapConfig, prog="python -m oq2vl_jax.curate.overlap", config=(tyro.conf.OmitArgPrefixes,))
    report = find_overlap(config)
    if report is None:
        return
    for name, of in report["benchmarks"].items():
        print(f"{name}: {of['overlapping']:,} of {of['pictures']:,} pictures overlap, {of['same_bytes']:,} by bytes")
    print(
        f"{report['matched']:,} of {report['pictures']:,} training pictures overlap; ids of {report['uids']:,} samples "
        f"in {config.out}/uids.npy, pairs to look at: {config.out}/report.html"
    )


if __name__ == "__main__":
    run_command(main)
