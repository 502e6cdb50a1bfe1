"""Scores captions with an MLM-Filter (arXiv 2403.02677): a model of this project's own architecture reads image and
caption and writes an integer 0-100 for each of four metrics, with greedy decoding.

The criteria texts belong to the weights. Ours (criteria.json) are the default; pass those a model was trained with.
Two profiles define the prompt and the parsing of the reply:
  own         the checkpoint's template, then a space; three new tokens, so that 100 can be written
  mlm_filter  the published scorer for Qwen2.5 (github.com/Victorwz/MLM_Filter, conversation qwen_instruct): a system
              message without a full stop, no line break after <|im_end|>, at most 2,040 tokens with the image counted
              as one, then a space; two new tokens, so that 100 is read as 10; "85," is read as 85
A reply that is not an integer 0-100 gets the score null and is counted.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from oq2vl_jax import paths
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.codec import IMAGE_IN_TEXT, TextCodec
from oq2vl_jax.data.text.templates import IMAGE
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.reply import SamplingOptions

DEFAULT_CRITERIA = Path(__file__).parent / "criteria.json"
MAX_CAPTION_CHARACTERS = 4000
"""The rest of a longer caption is not read (profile own)."""
PUBLISHED_SYSTEM = "You are a helpful assistant"
PUBLISHED_MAX_TOKENS = 2040
Profile = Literal["own", "mlm_filter"]


class Question(NamedTuple):
    """One metric of one sample. sample: the sample's index in the batch."""

    prompt: list[int]
    image: bytes
    sample: int
    metric: str


class MLMFilterScorer:
    """Asks the model for every metric of every sample."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int,
        criteria: str | None,
        metrics: tuple[str, ...],
        profile: Profile = "own",
    ):
        """Raises UserError for a checkpoint or criteria file that does not fit."""
        self.profile: Profile = profile
        self.criteria = read_criteria(criteria or str(DEFAULT_CRITERIA), metrics)
        self.columns = tuple(self.criteria)
        self.generator = Generator(checkpoint)
        self.batch_size = batch_size

    def prepare(self, sample: Sample) -> tuple[bytes, list[list[int]]]:
        """Returns (encoded image, one prompt per metric). Raises ImageError, and SampleError if the caption is not
        UTF-8."""
        assert sample.text is not None
        decode_image(sample.images[0], self.generator.model_config.vision.image_size)
        caption = sample.text.replace(IMAGE, IMAGE_IN_TEXT)
        if self.profile == "own":
            caption = sample.text.strip()[:MAX_CAPTION_CHARACTERS].replace(IMAGE, IMAGE_IN_TEXT)
        return sample.images[0], [self._prompt(text.replace("{caption}", caption)) for text in self.criteria.values()]

    def _prompt(self, text: str) -> list[int]:
        codec = self.generator.codec
        if self.profile == "mlm_filter":
            return published_prompt(codec, text, self.generator.model_config.num_visual_tokens)
        return self.generator.encode_prompt(text, 1) + codec.encode(" ")

    def score(self, prepared: list[tuple[bytes, list[list[int]]]]) -> list[dict[str, int | None]]:
        """Scores at most batch_size samples. Questions are sorted by length; the last batch is padded."""
        options = SamplingOptions(2 if self.profile == "mlm_filter" else 3)
        parse = parse_published_score if self.profile == "mlm_filter" else parse_score
        questions = [Question(prompt, image, i, metric) for i, (image, prompts) in enumerate(prepared)
                     for metric, prompt in zip(self.columns, prompts, strict=True)]  # fmt: skip
        questions.sort(key=lambda question: len(question.prompt))
        scores: list[dict[str, int | None]] = [{} for _ in prepared]
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            filled = batch + [batch[-1]] * (self.batch_size - len(batch))
            requests = [Request(question.prompt, [question.image]) for question in filled]
            replies = self.generator.generate(requests, options)
            for question, reply in zip(batch, replies, strict=False):
                scores[question.sample][question.metric] = parse(reply.text)
        return scores


def published_prompt(codec: TextCodec, text: str, num_visual_tokens: int) -> list[int]:
    """Returns the token ids of the published scorer's prompt. Raises SampleError.

    Deviation: a special token that is spelled out in the text stays text; the published scorer encodes it as the token.
    """
    special = codec.special
    head = [special.turn_start, *codec.encode(f"system\n{PUBLISHED_SYSTEM}"), special.eos]
    head += [special.turn_start, *codec.encode("user\n")]
    tail = [*codec.encode(f"\n{text}"), special.eos, special.turn_start, *codec.encode("assistant\n")]
    tail = tail[: PUBLISHED_MAX_TOKENS - len(head) - 1]
    return [*head, *[special.image] * num_visual_tokens, *tail, *codec.encode(" ")]


def read_criteria(path: str, metrics: tuple[str, ...]) -> dict[str, str]:
    """Reads {metric: text with {caption}} for the given metrics, in their order. Raises UserError."""
    texts = paths.read_json(path)
    if not isinstance(texts, dict) or not all(isinstance(text, str) and "{caption}" in text for text in texts.values()):
        raise UserError(f"{path}: expected a JSON object of texts by metric, each with {{caption}} in it.")
    missing = [name for name in metrics if name not in texts]
    if missing:
        raise UserError(f"{path}: no text for the metric {missing[0]}{hint(missing[0], texts)}.")
    return {name: texts[name] for name in metrics}


def parse_score(reply: str) -> int | None:
    """Returns the integer 0-100 if the reply is only that, with or without a final full stop; else None."""
    match = re.fullmatch(r"([0-9]{1,3})\.?", reply.strip())
    return int(match[1]) if match and int(match[1]) <= 100 else None


def parse_published_score(reply: str) -> int | None:
    """Reads a score as the published filter does: strips commas, then semicolons, around the first line and parses an
    integer. Returns None unless that gives 0-100."""
    try:
        score = int(reply.split("\n")[0].strip(",").strip(";"))
    except ValueError:
        return None
    return score if 0 <= score <= 100 else None
