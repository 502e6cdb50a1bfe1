"""Scores of an MLM-Filter (arXiv 2403.02677): a model of this project's own architecture that reads image and caption
and writes an integer 0-100 for each of four metrics, greedily.

The criteria text belongs to the weights. Ours (criteria.json) is the default; pass the one a model was trained with.
The prompt ends with a space, as the published scorer's does; it allows two new tokens, which makes a literal 100 a 10,
so three are allowed here. A reply that is no integer 0-100 scores null and is counted.
"""

import re
from pathlib import Path

from oq2vl_jax.data import paths
from oq2vl_jax.data.images import decode_image
from oq2vl_jax.data.shards import Sample
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.eval.generator import Generator, Request
from oq2vl_jax.eval.reply import SamplingOptions

METRICS = ("image_text_matching", "object_detail_fulfillment", "caption_text_quality", "semantic_understanding")
DEFAULT_CRITERIA = Path(__file__).parent / "criteria.json"
MAX_NEW_TOKENS = 3
MAX_CAPTION_CHARACTERS = 4000
"""The rest of a longer caption is not read."""


class MLMFilterScorer:
    """Asks the model for every metric of every sample."""

    def __init__(self, checkpoint: str, batch_size: int, criteria: str | None, metrics: tuple[str, ...]):
        """Raises UserError for a checkpoint or criteria file that does not fit."""
        self.criteria = read_criteria(criteria or str(DEFAULT_CRITERIA), metrics)
        self.columns = tuple(self.criteria)
        self.generator = Generator(checkpoint)
        self.batch_size = batch_size

    def prepare(self, sample: Sample) -> tuple[bytes, list[list[int]]]:
        """(encoded image, a prompt for each metric). Raises ImageError, and SampleError for a caption without UTF-8."""
        assert sample.text is not None
        decode_image(sample.images[0], self.generator.model_config.vision.image_size)
        caption = sample.text.strip()[:MAX_CAPTION_CHARACTERS].replace("<image>", "<image-placeholder>")
        space = self.generator.codec.encode(" ")
        texts = [text.replace("{caption}", caption) for text in self.criteria.values()]
        return sample.images[0], [self.generator.encode_prompt(text, 1) + space for text in texts]

    def score(self, prepared: list[tuple[bytes, list[list[int]]]]) -> list[dict[str, int | None]]:
        """At most batch_size samples. Questions are asked in batches of one shape, sorted by length."""
        questions = [(prompt, image, i, name) for i, (image, prompts) in enumerate(prepared)
                     for name, prompt in zip(self.columns, prompts, strict=True)]  # fmt: skip
        questions.sort(key=lambda question: len(question[0]))
        scores: list[dict[str, int | None]] = [{} for _ in prepared]
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            filled = batch + [batch[-1]] * (self.batch_size - len(batch))
            requests = [Request(prompt, [image]) for prompt, image, _, _ in filled]
            replies = self.generator.generate(requests, SamplingOptions(MAX_NEW_TOKENS))
            for (_, _, i, name), reply in zip(batch, replies, strict=False):
                scores[i][name] = parse_score(reply.text)
        return scores


def read_criteria(path: str, metrics: tuple[str, ...]) -> dict[str, str]:
    """{metric: text with {caption}} of the wanted metrics, in their order. Raises UserError."""
    texts = paths.read_json(path)
    if not isinstance(texts, dict) or not all(isinstance(text, str) and "{caption}" in text for text in texts.values()):
        raise UserError(f"{path}: expected a JSON object of texts by metric, each with {{caption}} in it.")
    missing = [name for name in metrics if name not in texts]
    if missing:
        raise UserError(f"{path}: no text for the metric {missing[0]}{hint(missing[0], texts)}.")
    return {name: texts[name] for name in metrics}


def parse_score(reply: str) -> int | None:
    """The integer 0-100 that a reply begins with, and consists of; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,3})\.?", reply.strip())
    return int(match[1]) if match and int(match[1]) <= 100 else None
