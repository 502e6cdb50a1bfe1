"""Reads the documents of input files; samples that cannot be used are counted by reason, and oddities are noted."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from oq2vl_jax.data.samples.chats import with_turns
from oq2vl_jax.data.samples.formats import format_of
from oq2vl_jax.data.samples.formats.format import Reading
from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.samples.tars import CutOffError
from oq2vl_jax.data.text.codec import SampleError, TextCodec
from oq2vl_jax.data.text.document import Document

NOTHING_BESIDE = Reading()
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
    long_documents: Literal["auto", "skip", "cut"] = "auto"
    """Interleaved documents that do not fit a row: count them out, or cut them; auto cuts those of parquet files."""

    def cuts(self, is_format_cut: bool) -> bool:
        return self.long_documents == "cut" or (self.long_documents == "auto" and is_format_cut)


def read_documents(
    files: Iterable[str],
    codec: TextCodec,
    limits: Limits,
    broken_shards: Literal["stop", "keep"],
    reading: Reading = NOTHING_BESIDE,
    left_out: Callable[[str | None], str | None] = lambda uid: None,
) -> tuple[list[Document], dict]:
    """Returns documents in the order of the files, and {"samples", "skipped": {reason: count}, "notes": {note: count}}.

    left_out: (id of a sample) to the reason why it is not wanted, or None. samples = documents + skipped, except for
    shard_cut_off, which counts files whose end is missing, and for extra_part, the documents that come of cutting.
    """
    documents, num_samples = [], 0
    skipped, notes = Counter(), Counter()
    for file in files:
        format = format_of(file)
        cuts = limits.cuts(format.cuts_long_documents)
        try:
            for sample in format.read(file, reading):
                num_samples += 1
                if not sample.problem and (reason := left_out(sample.uid)) is not None:
                    skipped[reason] += 1
                    continue
                try:
                    found, sample_notes = documents_of(sample, codec, limits, cuts)
                except (SampleError, ImageError) as problem:
                    skipped[problem.reason] += 1
                    continue
                documents += found
                notes.update(sample_notes)
        except CutOffError:
            if broken_shards == "stop":
                raise
            skipped["shard_cut_off"] += 1
    return documents, {"samples": num_samples, "skipped": dict(skipped), "notes": dict(notes)}


def documents_of(sample: Sample, codec: TextCodec, limits: Limits, cuts: bool) -> tuple[list[Document], list[str]]:
    """Returns the documents of a sample, several only if an interleaved one is cut, and notes on its oddities.

    Raises SampleError or ImageError with the reason.
    """
    if cuts and sample.elements is not None:
        return cut_document(sample, codec, limits)
    document, notes = make_document(sample, codec, limits)
    return [document], notes


def make_document(sample: Sample, codec: TextCodec, limits: Limits) -> tuple[Document, list[str]]:
    """Returns the document of a sample and notes on its oddities. Raises SampleError or ImageError with the reason."""
    if limits.template != "plain":  # conversations need a template, which codec.document says
        sample = with_turns(sample, limits.unmarked_images == "first")
    if num_characters(sample) > MAX_CHARACTERS_PER_TOKEN * limits.num_tokens:
        raise SampleError("text_too_long")
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


def cut_document(sample: Sample, codec: TextCodec, limits: Limits) -> tuple[list[Document], list[str]]:
    """Returns an interleaved document as parts that fit a row, one if it fits whole, and notes. Nothing is left out.

    Raises SampleError or ImageError. Several pictures are no reason to skip it: a part takes as many as a row.
    """
    if (
        max((len(text or "") for text in sample.elements or ()), default=0)
        > MAX_CHARACTERS_PER_TOKEN * limits.num_tokens
    ):
        raise SampleError("text_too_long")
    if not sample.problem and not sample.images:
        raise SampleError("image_missing")
    if limits.visual_tokens + 2 > limits.num_tokens or limits.max_images < 1:
        raise SampleError("too_many_tokens")
    notes = [*sample.notes, *codec.text_notes(sample)]
    for image in sample.images:
        notes += check_image(image)
    parts = codec.interleaved_parts(sample, limits.visual_tokens, limits.num_tokens, limits.max_images)
    return parts, notes + (["document_cut"] + ["extra_part"] * (len(parts) - 1) if len(parts) > 1 else [])


def num_characters(sample: Sample) -> int:
    """Returns the number of characters in all texts of a sample."""
    turns = sample.conversations if isinstance(sample.conversations, list) else ()
    texts = [sample.text, *(sample.elements or ()), *(turn.get("value") for turn in turns if isinstance(turn, dict))]
    return sum(len(text) for text in texts if isinstance(text, str))
