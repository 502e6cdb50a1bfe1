"""Reads the documents of input files; samples that cannot be used are counted by reason, and oddities are noted."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from oq2vl_jax.data.samples.chats import with_turns
from oq2vl_jax.data.samples.formats import format_of
from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.samples.tars import CutOffError
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.data.text.document import Document

MAX_INTERLEAVED_IMAGES = 9
"""Interleaved documents with more images, or without any, are skipped, as in the published code."""


MAX_CHARACTERS_PER_TOKEN = 64
"""A sample with more characters per token of a row is skipped before it is tokenised: one word of 10 MB takes a
tokenizer 2 GB and a minute."""


class Limits(NamedTuple):
    template: str
    num_tokens: int
    max_images: int
    visual_tokens: int
    unmarked_images: Literal["first", "skip"] = "first"
    """Conversations whose pictures have no place in the text: put them first, or count the sample out."""


def read_documents(
    files: Iterable[str],
    codec: TextCodec,
    limits: Limits,
    broken_shards: Literal["stop", "keep"],
    images: str | None = None,
) -> tuple[list[Document], dict]:
    """Returns documents in the order of the files, and {"samples", "skipped": {reason: count}, "notes": {note: count}}.

    images: folder of the pictures that instruction files name. samples = documents + skipped, except for
    shard_cut_off, which counts files whose end is missing.
    """
    documents, num_samples = [], 0
    skipped, notes = Counter(), Counter()
    for file in files:
        try:
            for sample in format_of(file).read(file, images):
                num_samples += 1
                try:
                    document, sample_notes = make_document(sample, codec, limits)
                except (SampleError, ImageError) as problem:
                    skipped[problem.reason] += 1
                    continue
                documents.append(document)
                notes.update(sample_notes)
        except CutOffError:
            if broken_shards == "stop":
                raise
            skipped["shard_cut_off"] += 1
    return documents, {"samples": num_samples, "skipped": dict(skipped), "notes": dict(notes)}


def make_document(sample: Sample, codec: TextCodec, limits: Limits) -> tuple[Document, list[str]]:
    """Returns the document of a sample and notes on its oddities. Raises SampleError or ImageError with the reason."""
    if num_characters(sample) > MAX_CHARACTERS_PER_TOKEN * limits.num_tokens:
        raise SampleError("text_too_long")
    if limits.template != "plain":  # conversations need a template, which codec.document says
        sample = with_turns(sample, limits.unmarked_images == "first")
    document = codec.document(sample, limits.template, limits.visual_tokens)
    if sample.elements is not None and not 1 <= len(document.images) <= MAX_INTERLEAVED_IMAGES:
        raise SampleError("too_many_images" if document.images else "image_missing")
    if len(document.tokens) > limits.num_tokens:
        raise SampleError("too_many_tokens")
    if len(document.images) > limits.max_images:
        raise SampleError("too_many_images")
    if not document.is_labelled.any():
        raise SampleError("nothing_labelled")
    notes = [*sample.notes, *codec.text_notes(sample)]
    for image in document.images:
        notes += check_image(image)
    return document, notes


def num_characters(sample: Sample) -> int:
    """Returns the number of characters in all texts of a sample."""
    turns = sample.conversations if isinstance(sample.conversations, list) else ()
    texts = [sample.text, *(sample.elements or ()), *(turn.get("value") for turn in turns if isinstance(turn, dict))]
    return sum(len(text) for text in texts if isinstance(text, str))
