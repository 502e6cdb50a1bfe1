"""Makes a checkpoint a model of lmms-eval 0.7.3 (extra `lmms-eval`), which finds it by the entry point in pyproject.

    python -m lmms_eval --model oq2vl_jax --model_args checkpoint=runs/sft_llava --tasks mmstar --batch_size 16

lmms-eval's multiple_choice takes the smallest loss, so loglikelihood returns minus the log-probability. lmms-eval turns
a bare (loss, flag) pair into text, so the pair is wrapped in a GenerationResult.
"""

import io
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from oq2vl_jax.config import Weights
from oq2vl_jax.data.text.templates import IMAGE
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.reply import SamplingOptions

DEFAULT_NEW_TOKENS = 128


class LossAndFlag(tuple):
    """(loss, is_greedy). lmms-eval calls strip() on a result before caching it; the empty text prevents caching."""

    def strip(self) -> str:
        return ""


class OQ2VL(lmms):
    """A checkpoint of this project. template: the prompt template; default: that of the checkpoint's training data.
    weights, projector: as in Generator."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        template: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        weights: Weights = "model",
        projector: str | None = None,
    ):
        super().__init__()
        self.generator = Generator(str(checkpoint), template, dtype, weights=weights, projector=projector)
        self.batch_size, self.device = int(batch_size), device or "cpu"

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns one reply per request, in order. Requests with the same generation arguments share batches."""
        groups: dict[SamplingOptions, list[int]] = {}
        encoded = []
        for number, request in enumerate(requests):
            context, arguments, doc_to_visual, doc_id, task, split = request.args
            encoded.append(self._request(context, doc_to_visual(self.task_dict[task][split][doc_id])))
            groups.setdefault(sampling_options(arguments), []).append(number)
        replies = [""] * len(encoded)
        for options, numbers in groups.items():
            chosen = [encoded[number] for number in numbers]
            for i, reply in self.generator.generate_all(chosen, options, self.batch_size):
                replies[numbers[i]] = reply.text.strip()
        return replies

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Returns the loss of each continuation: minus its log-probability, summed over its tokens."""
        results = []
        for first in range(0, len(requests), self.batch_size):
            some = [request.args for request in requests[first : first + self.batch_size]]
            prompts, options = [], []
            for context, continuation, doc_to_visual, doc_id, task, split in some:
                doc = self.task_dict[task][split][doc_id]
                text = str(continuation(doc) if callable(continuation) else continuation)
                prompts.append(self._request(context, doc_to_visual(doc)))
                options.append([self.generator.codec.encode(text.strip())])
            padding = self.batch_size - len(some)
            scores = self.generator.score(prompts + prompts[-1:] * padding, options + options[-1:] * padding)
            results += [GenerationResult(LossAndFlag((-row[0], False))) for row in scores[: len(some)]]
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Returns the replies of all rounds of each request. doc_to_text gives the next question."""
        results = []
        for request in requests:
            context, arguments, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            images, replies, info, is_done = doc_to_visual(doc), [], None, False
            while not is_done:
                reply = self.generator.generate([self._request(context, images)], sampling_options(arguments))[0]
                replies.append(reply.text.strip())
                visuals, context, is_done, previous, info = doc_to_text(
                    doc, previous_output=replies, round_idx=len(replies), previous_round_info=info
                )
                replies, images = list(previous or replies), images if visuals is None else visuals
            results.append(replies)
        return results

    def _request(self, context: str, visuals: Any) -> Request:
        """Places the pictures at the <image> markers if there is one per picture, else before the text."""
        images = encoded_images(visuals)
        if context.count(IMAGE) != len(images):
            context = f"{IMAGE}\n" * len(images) + context.replace(IMAGE, "").strip()
        return Request(self.generator.encode_turns([context]), images)


def sampling_options(arguments: dict[str, Any]) -> SamplingOptions:
    """Converts lmms-eval's generation arguments; greedy unless do_sample or a temperature asks for sampling."""
    until = arguments.get("until") or []
    is_sampled = arguments.get("do_sample", bool(arguments.get("temperature")))
    return SamplingOptions(
        max_new_tokens=int(arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        temperature=float(arguments.get("temperature") or 0) if is_sampled else 0.0,
        top_p=float(arguments.get("top_p") or 1),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def encoded_images(visuals: Any) -> list[bytes]:
    """Converts PIL images, {"bytes", "path"} of parquet files, paths, or lists of these to encoded bytes."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [image for item in visuals for image in encoded_images(item)]
    if isinstance(visuals, dict):
        return encoded_images(visuals["bytes"] or visuals["path"])
    if isinstance(visuals, bytes):
        return [visuals]
    if isinstance(visuals, str):
        with open(visuals, "rb") as file:
            return [file.read()]
    assert isinstance(visuals, Image.Image), type(visuals)
    buffer = io.BytesIO()
    visuals.convert("RGB").save(buffer, "PNG")
    return [buffer.getvalue()]
