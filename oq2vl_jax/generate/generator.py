"""Runs a loaded checkpoint from the host: prompts and images in, text out, in batches of few shapes."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oq2vl_jax.config import MeshConfig, ModelConfig, PromptForm, Weights
from oq2vl_jax.data.samples.images import decode_image
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.data.text.templates import IMAGE
from oq2vl_jax.errors import UserError
from oq2vl_jax.generate.decoding import (
    NOTHING,
    DecodeState,
    Sampling,
    TokenScores,
    decode,
    encode_images,
    first_scores,
    prefill,
    score_options,
    start,
    take_apart,
)
from oq2vl_jax.generate.loading import open_model
from oq2vl_jax.generate.reply import Reply, ReplyText, SamplingOptions
from oq2vl_jax.memory import check_fits
from oq2vl_jax.model.open_qwen2vl import OpenQwen2VL
from oq2vl_jax.model.qwen2 import cache_bytes
from oq2vl_jax.sharding import device_bytes, make_mesh, replicated, row_sharding

SMALLEST_BUCKET = 32
STEPS_PER_CALL = 16
"""Tokens decoded between two checks of the stop strings."""
STEPS_PER_PIECE = 4
"""Tokens decoded per piece of streamed text."""
NUM_CACHED_IMAGES = 64
"""Images whose visual tokens are cached, because neighbouring questions often share an image."""
MAX_IMAGES_AT_ONCE = 32


class Request(NamedTuple):
    """prompt: token ids, with num_visual_tokens placeholders per image; images: contents of image files, in order."""

    prompt: list[int]
    images: list[bytes]


class Generator:
    """A checkpoint that answers prompts and scores options, on all devices."""

    prompt_form: PromptForm = "training"
    checkpoint = identity = "a model in memory"
    weights_name: Weights = "model"

    def __init__(
        self,
        checkpoint: str,
        template: str | None = None,
        dtype: str | None = None,
        prompt_form: PromptForm = "training",
        weights: Weights = "model",
        projector: str | None = None,
    ):
        """checkpoint: or an export, or a hub id (loading.py). dtype: of decoder matrices and activations; default
        float32 on CPUs, bfloat16 elsewhere. weights: ema takes the averaged ones. projector: see describe. Raises
        UserError."""
        opened = open_model(checkpoint, weights, projector)
        description = opened.description
        self.prompt_form = prompt_form
        if prompt_form == "published" and (template or description.template) != "open_qwen2vl":
            name = template or description.template
            raise UserError(f"--prompt-form published is a form of the template open_qwen2vl; this is {name}.")
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        mesh = make_mesh(MeshConfig())
        name = template or description.template
        self._set_up(opened.read(mesh), description.model, name, opened.codec, mesh, dtype)
        self.checkpoint, self.identity, self.weights_name = opened.name, opened.identity, weights

    @staticmethod
    def of_model(
        model: OpenQwen2VL, config: ModelConfig, template: str, codec: TextCodec, mesh: Mesh, dtype: str
    ) -> "Generator":
        """Makes a Generator of a model in memory, for replies during training."""
        generator = Generator.__new__(Generator)
        generator._set_up(model, config, template, codec, mesh, dtype)
        return generator

    def _set_up(
        self, model: OpenQwen2VL, config: ModelConfig, template: str, codec: TextCodec, mesh: Mesh, dtype: str
    ) -> None:
        self.model_config, self.template, self.codec, self.mesh, self.dtype = config, template, codec, mesh, dtype
        self.weights = take_apart(model, dtype)
        self.stop_tokens = jnp.array([codec.special.eos, codec.special.pad])
        self.stops = set(self.stop_tokens.tolist())
        self._visual_tokens: OrderedDict[bytes, jax.Array] = OrderedDict()

    def encode_prompt(self, prompt: str, num_images: int) -> list[int]:
        """Returns token ids with the images before the text. Raises UserError if the text contains <image>."""
        if IMAGE in prompt:
            raise UserError(f"the prompt {prompt!r} contains {IMAGE}; images are put before the prompt, in order.")
        return self.encode_turns([f"{IMAGE}\n" * num_images + prompt.strip()])

    def encode_turns(self, turns: list[str], system: str | None = None, template: str | None = None) -> list[int]:
        """Returns the token ids of a conversation, human first and last, with the images in place of <image>."""
        template, num_visual_tokens = template or self.template, self.model_config.num_visual_tokens
        if self.prompt_form == "published" and template == "open_qwen2vl":
            return self.codec.published_prompt(turns, num_visual_tokens, system)
        return self.codec.prompt(turns, template, num_visual_tokens, system)

    def ask(self, prompt: str, images: Sequence[bytes], options: SamplingOptions) -> str:
        """Returns the reply to one question about images (contents of files)."""
        request = Request(self.encode_prompt(prompt, len(images)), list(images))
        return self.generate([request], options)[0].text.strip()

    def generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Reply]:
        """Replies to one batch. Raises ImageError."""
        texts = [ReplyText(self.codec, self.stops, options) for _ in requests]
        for new_tokens in self._decode(requests, options, STEPS_PER_CALL):
            for text, tokens in zip(texts, new_tokens, strict=False):
                text.add(tokens)
            if all(text.is_done for text in texts):
                break
        return [text.reply() for text in texts]

    def generate_all(
        self, requests: Sequence[Request], options: SamplingOptions, batch_size: int
    ) -> Iterator[tuple[int, Reply]]:
        """Yields (index, reply) for any number of requests, in batches of similar length, each of batch_size rows."""
        for chosen in self.batches(requests, batch_size):
            padded = chosen + [chosen[-1]] * (batch_size - len(chosen))
            yield from zip(chosen, self.generate([requests[i] for i in padded], options), strict=False)

    @staticmethod
    def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
        """Yields batches of request indices: similar lengths together, requests with the same images adjacent."""
        order = sorted(
            range(len(requests)), key=lambda i: (bucket(len(requests[i].prompt)), tuple(requests[i].images), i)
        )
        for first in range(0, len(order), batch_size):
            yield order[first : first + batch_size]

    def stream(self, request: Request, options: SamplingOptions) -> Iterator[str]:
        """Yields the reply to one request piece by piece, as it is generated."""
        text = ReplyText(self.codec, self.stops, options)
        for new_tokens in self._decode([request], options, STEPS_PER_PIECE):
            text.add(new_tokens[0])
            piece = text.new_piece()
            if piece:
                yield piece
            if text.is_done:
                return

    def score(self, requests: Sequence[Request], options: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Returns the log-probability of each option (token ids) after its request, summed over the option's tokens."""
        width = power_of_two(max(len(option) for row in options for option in row))
        padded = np.full((len(requests), power_of_two(max(map(len, options))), width), NOTHING, np.int32)
        for row, of_row in enumerate(options):
            for i, option in enumerate(of_row):
                padded[row, i, : len(option)] = option
        logits, cache, lengths = self.prefill(requests, num_new=width)
        extra = len(lengths) - len(padded)
        padded = np.concatenate([padded, np.repeat(padded[-1:], extra, axis=0)])
        scores = np.asarray(score_options(self.weights, logits, cache, lengths, self._rows(padded), self.dtype))
        return [scores[row, : len(of_row)].tolist() for row, of_row in enumerate(options)]

    def prefill(self, requests: Sequence[Request], num_new: int, num_slots: int | None = None):
        """Returns (logits, cache, lengths) of a batch. Tokens are padded to a bucket. Several rows are padded to a
        multiple of the number of devices; a single row stays one."""
        num_rows = -(-len(requests) // self.mesh.size) * self.mesh.size if len(requests) > 1 else 1
        longest = max(len(request.prompt) for request in requests)
        num_slots = num_slots or bucket(bucket(longest) + num_new)
        self.check_cache(num_rows, num_slots)
        requests = [*requests, *[requests[-1]] * (num_rows - len(requests))]
        lengths = np.array([len(request.prompt) for request in requests], np.int32)
        padded_length = min(bucket(longest), num_slots)
        tokens = np.full((num_rows, padded_length), self.codec.special.pad, np.int32)
        visual_index = np.full(tokens.shape, NOTHING, np.int32)
        visual_tokens, number_of = self._encode_images(requests)
        per_image = self.model_config.num_visual_tokens
        for row, request in enumerate(requests):
            prompt = np.array(request.prompt)
            tokens[row, : len(prompt)] = prompt
            numbers = np.array([number_of[data] for data in request.images], np.int32)
            is_image = prompt == self.model_config.image_token_id
            if is_image.sum() != len(numbers) * per_image:
                raise UserError(f"a prompt has {is_image.sum() // per_image} places for {len(numbers)} images.")
            index = (numbers[:, None] * per_image + np.arange(per_image)).reshape(-1)
            visual_index[row, : len(prompt)][is_image] = index
        placed = [self._rows(array) for array in (tokens, lengths, visual_index)]
        logits, cache = prefill(
            self.weights, placed[0], placed[1], visual_tokens, placed[2], num_slots=num_slots, dtype=self.dtype
        )
        return logits, cache, placed[1]

    def check_cache(self, num_rows: int, num_slots: int) -> None:
        """Raises UserError if the cache does not fit: on all devices together, or on one if the rows do not divide."""
        num_bytes = cache_bytes(self.model_config.decoder, num_rows, num_slots, self.dtype)
        num_devices = self.mesh.size if num_rows % self.mesh.size == 0 else 1
        label = f"the cache of {num_rows:,} rows of {num_slots:,} tokens"
        check_fits(
            label, num_bytes, num_devices * device_bytes(), "what holds it", "take fewer rows or fewer new tokens"
        )

    def sampling(self, options: SamplingOptions, num_rows: int) -> Sampling:
        columns = (options.temperature, options.top_p, options.top_k, options.seed)
        kinds = (np.float32, np.float32, np.int32, np.int32)
        return Sampling(*(self._rows(np.full(num_rows, c, kind)) for c, kind in zip(columns, kinds, strict=True)))

    def start(
        self, requests: Sequence[Request], options: SamplingOptions, num_slots: int | None = None, num_top: int = 0
    ) -> tuple[DecodeState, TokenScores | None]:
        """Runs the prompts. Returns the state with the first new token of each row, and its scores if num_top > 0."""
        logits, cache, lengths = self.prefill(requests, options.max_new_tokens, num_slots)
        state = start(logits, cache, lengths, self.sampling(options, len(lengths)), self.stop_tokens)
        return state, first_scores(logits, state.token, num_top) if num_top else None

    def _decode(
        self, requests: Sequence[Request], options: SamplingOptions, steps_per_call: int
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of each row after every call, including stop tokens."""
        state, _ = self.start(requests, options)
        sampling = self.sampling(options, len(state.token))
        yield [[token] for token in np.asarray(state.token).tolist()]
        left = options.max_new_tokens - 1
        while left > 0 and not bool(state.is_done.all()):
            num_steps = min(left, steps_per_call)
            state, output, _ = decode(self.weights, state, sampling, self.stop_tokens, num_steps, self.dtype)
            yield [[token for token in row if token != NOTHING] for row in np.asarray(output).tolist()]
            left -= num_steps

    def _encode_images(self, requests: Sequence[Request]) -> tuple[jax.Array | None, dict[bytes, int]]:
        """Returns (visual tokens [N, D] of the batch's images, index of each image); encodes every image once."""
        wanted = list(dict.fromkeys(data for request in requests for data in request.images))
        if not wanted:
            return None, {}
        size = self.model_config.vision.image_size
        name_of = {data: hashlib.sha256(data).digest() for data in wanted}
        new = [data for data in wanted if name_of[data] not in self._visual_tokens]
        for first in range(0, len(new), MAX_IMAGES_AT_ONCE):
            some = new[first : first + MAX_IMAGES_AT_ONCE]
            pixels = np.zeros((power_of_two(len(some)), size, size, 3), np.uint8)
            for i, data in enumerate(some):
                pixels[i] = decode_image(data, size, as_seen=True)
            encoded = encode_images(self.weights.model, self._rows(pixels), self.dtype)
            for data, tokens in zip(some, encoded, strict=False):
                self._visual_tokens[name_of[data]] = tokens
        for name in name_of.values():
            self._visual_tokens.move_to_end(name)
        rows = [self._visual_tokens[name] for name in name_of.values()]
        stacked = jnp.concatenate(rows + [jnp.zeros_like(rows[0])] * (power_of_two(len(rows)) - len(rows)))
        while len(self._visual_tokens) > NUM_CACHED_IMAGES:
            self._visual_tokens.popitem(last=False)
        return jax.device_put(stacked, replicated(self.mesh)), {data: i for i, data in enumerate(wanted)}

    def _rows(self, array: np.ndarray) -> jax.Array:
        """Puts an array on the devices, sharded by rows if they divide evenly, else replicated."""
        divides = len(array) % self.mesh.size == 0
        return jax.device_put(array, row_sharding(self.mesh) if divides else replicated(self.mesh))


def bucket(length: int) -> int:
    """Rounds `length` up to one of few sizes: a multiple of 32 and of an eighth of the next power of two."""
    step = max(SMALLEST_BUCKET, power_of_two(length) // 8)
    return -(-length // step) * step


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number` >= 1."""
    return 1 << (number - 1).bit_length()
