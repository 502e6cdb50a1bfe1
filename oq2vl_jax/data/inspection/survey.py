"""Reads some samples of data sets, or all, and counts what a person wants to know before packing them.

Files are taken in parts (row groups, ranges of entries, whole tars) in an order drawn from the seed, and a process per
core reads them until enough samples are read.
"""

import functools
import itertools
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import xxhash

from oq2vl_jax.data.packing.documents import MAX_CHARACTERS_PER_TOKEN, Limits, documents_of, num_characters
from oq2vl_jax.data.samples.chats import with_turns
from oq2vl_jax.data.samples.formats import format_of, parts_of
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.images import ImageError, image_size
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.data.text.document import Document
from oq2vl_jax.data.text.language import language_model
from oq2vl_jax.errors import UserError

ENTRIES_PER_PART = 500
FEWEST_PARTS = 16
"""A sample of a data set comes from at least as many parts, if there are as many; a part is then not read whole."""
KEYS_PER_REASON = 3
LANGUAGE_CHARACTERS = 500
UNLIMITED = 2**31


@dataclass
class Survey:
    """What was counted, of the samples that were read."""

    samples: int = 0
    whole_parts: int = 0
    """Parts that were read to their end, and their samples."""
    whole_samples: int = 0
    skipped: Counter = field(default_factory=Counter)
    keys: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> some keys of samples that are skipped for it."""
    notes: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    pictures: Counter = field(default_factory=Counter)
    """Number of pictures -> samples."""
    tokens: list[int] = field(default_factory=list)
    """Of each sample that has a document, also of one that is too long."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: Counter = field(default_factory=Counter)
    """Digest of a picture's bytes -> times."""
    shown: list[Document] = field(default_factory=list)

    def add(self, other: "Survey") -> None:
        self.samples += other.samples
        self.whole_parts += other.whole_parts
        self.whole_samples += other.whole_samples
        for name in ("skipped", "notes", "languages", "pictures", "hashes"):
            getattr(self, name).update(getattr(other, name))
        for reason, keys in other.keys.items():
            self.keys[reason] = (self.keys.get(reason, []) + keys)[:KEYS_PER_REASON]
        for name in ("tokens", "sizes", "shown"):
            getattr(self, name).extend(getattr(other, name))


class Part(NamedTuple):
    """A part of a file, and how its samples are read. most: samples read of it, None for all."""

    path: str
    most: int | None
    shown: int
    seed: int
    reading: Reading
    limits: Limits
    tokenizer: str


class Total(NamedTuple):
    """Samples of the files: known, "about" (from the parts that were read whole), or "at least" (none was)."""

    samples: int
    how: Literal["", "about ", "at least "]


def survey(
    files: list[str], tokenizer: str, limits: Limits, reading: Reading, num_samples: int | None, shown: int, seed: int,
    num_workers: int,
) -> tuple[Survey, Total]:  # fmt: skip
    """Surveys about num_samples of the files, all of them if None. Raises UserError."""
    rng = random.Random(seed)
    check = format_of(files[0]).check
    if check is not None:
        check(files[0], reading)
    paths = [part for file in files for part in parts_of(file, ENTRIES_PER_PART)]
    rng.shuffle(paths)
    most = None if num_samples is None else max(1, math.ceil(num_samples / min(len(paths), FEWEST_PARTS)))
    per_part = max(2, math.ceil(2 * shown / min(len(paths), FEWEST_PARTS)))
    parts = (Part(path, most, per_part, rng.getrandbits(32), reading, limits, tokenizer) for path in paths)
    found, num_read = Survey(), 0
    for one in in_processes(parts, num_workers):
        found.add(one)
        num_read += 1
        if num_samples is not None and found.samples >= num_samples:
            break
    found.shown = rng.sample(found.shown, min(shown, len(found.shown)))
    counts = [format_of(file).count for file in files]
    if all(count is not None for count in counts):
        return found, Total(sum(count(file) for count, file in zip(counts, files, strict=True) if count), "")
    if found.whole_parts == len(paths):
        return found, Total(found.samples, "")
    if not found.whole_parts:
        return found, Total(found.samples + len(paths) - num_read, "at least ")
    return found, Total(round(found.whole_samples / found.whole_parts * len(paths)), "about ")


def in_processes(parts: Iterator[Part], num_workers: int) -> Iterator[Survey]:
    """Yields the survey of each part in turn; parts are read ahead by the other processes."""
    if num_workers == 1:
        yield from map(survey_part, parts)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(survey_part, part) for part in itertools.islice(parts, 2 * num_workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(survey_part, part) for part in itertools.islice(parts, 1)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


load_codec = functools.lru_cache(maxsize=1)(TextCodec.load)


def survey_part(part: Part) -> Survey:
    codec, found, rng = load_codec(part.tokenizer), Survey(), random.Random(part.seed)
    languages = language_of()
    format = format_of(part.path)
    cuts = part.limits.cuts(format.cuts_long_documents)
    for sample in itertools.islice(format.read(part.path, part.reading), part.most):
        found.samples += 1
        images = with_turns(sample).images  # with those that a message holds
        found.pictures[len(images)] += 1
        for image in images:
            found.hashes[xxhash.xxh3_64_intdigest(image)] += 1
            try:
                found.sizes.append(image_size(image))
            except ImageError:
                continue  # counted by its reason below
        if languages is not None and (text := text_of(sample)):
            found.languages[languages(text)] += 1
        try:
            documents, notes = checked_documents(sample, codec, part.limits, cuts)
        except (SampleError, ImageError) as problem:
            count_out(found, problem.reason, sample.key)
            continue
        found.notes.update(notes)
        found.tokens.append(sum(len(document.tokens) for document in documents))
        reason = reason_of(documents, part.limits)
        if reason is not None:
            count_out(found, reason, sample.key)
        elif len(found.shown) < part.shown:
            found.shown.append(documents[0])
        elif (place := rng.randrange(found.samples)) < part.shown:  # a reservoir
            found.shown[place] = documents[0]
    if part.most is None or found.samples < part.most:
        found.whole_parts, found.whole_samples = 1, found.samples
    return found


def checked_documents(sample: Sample, codec: TextCodec, limits: Limits, cuts: bool) -> tuple[list[Document], list[str]]:
    """Returns the documents of a sample, also of one that is longer than a row, so that its length is known."""
    if cuts and sample.elements is not None:
        return documents_of(sample, codec, limits, cuts)
    turned = with_turns(sample) if limits.template != "plain" else sample
    if num_characters(turned) > MAX_CHARACTERS_PER_TOKEN * limits.num_tokens:
        raise SampleError("text_too_long")
    return documents_of(sample, codec, limits._replace(num_tokens=UNLIMITED, max_images=UNLIMITED), cuts)


def reason_of(documents: list[Document], limits: Limits) -> str | None:
    if any(len(document.tokens) > limits.num_tokens for document in documents):
        return "too_many_tokens"
    return "too_many_images" if any(len(document.images) > limits.max_images for document in documents) else None


def count_out(found: Survey, reason: str, key: str) -> None:
    found.skipped[reason] += 1
    keys = found.keys.setdefault(reason, [])
    if len(keys) < KEYS_PER_REASON:
        keys.append(key)


@functools.lru_cache(maxsize=1)
def language_of() -> Callable[[str], str] | None:
    """Returns the function from a text to its most likely language; None without the extra filter."""
    try:
        model = language_model()
    except UserError:
        return None

    def language(text: str) -> str:
        line = text.replace("\n", " ")[:LANGUAGE_CHARACTERS].encode("utf-8", "replace").decode()
        labels, _ = model.predict(line)
        return labels[0].removeprefix("__label__") if labels else "?"

    return language


def text_of(sample: Sample) -> str:
    """Returns the text of a sample, for its language."""
    if sample.text is not None:
        return sample.text.strip()
    if sample.elements is not None:
        return " ".join(text for text in sample.elements if text).strip()
    turns = with_turns(sample).conversations
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return " ".join(text.replace("<image>", "") for text in values if isinstance(text, str)).strip()
