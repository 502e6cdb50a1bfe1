"""Sampling options, and one reply during generation: decodes tokens, finds its end, yields text to show."""

from dataclasses import dataclass
from typing import NamedTuple

from oq2vl_jax.bounds import CountOrZero, Length, Seed, Temperature, TopP, check_bounds
from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.errors import UserError

NUM_TOP = 20
"""Largest number of alternatives per token whose log-probabilities can be requested, as in OpenAI's API."""
BROKEN_CHARACTER = "\ufffd"
"""Stands in decoded text for a character with missing bytes."""


@dataclass(frozen=True)
class SamplingOptions:
    """How replies are sampled. Greedy by default."""

    max_new_tokens: Length = 64
    temperature: Temperature = 0.0
    """0: the most likely token."""
    top_p: TopP = 1.0
    """Sample from the fewest most likely tokens that together have at least this probability."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0: from all."""
    seed: Seed = 0
    """The same request with the same seed gets the same reply, whatever else is in its batch."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply and are removed from it."""

    def __post_init__(self):
        check_bounds(self)
        if not all(self.stop):
            raise UserError("a stop text is empty.")


class Reply(NamedTuple):
    """text: without stop token and stop text; finish_reason: "stop", or "length" if max_new_tokens ended it."""

    text: str
    tokens: list[int]
    finish_reason: str


class ReplyText:
    """One reply during generation: decodes tokens, applies stop tokens and stop texts, yields text to show.

    Every call decodes and searches only new text, so that the cost per token does not grow with the reply.
    """

    def __init__(self, codec: TextCodec, stop_tokens: set[int], options: SamplingOptions):
        self._codec, self._stops, self._options = codec, stop_tokens, options
        self.tokens: list[int] = []
        self.text, self.is_done, self._finish_reason, self._num_shown = "", False, "length", 0
        self._num_whole, self._whole, self._searched_from = 0, "", 0
        """Number of tokens whose text ends with a whole character, that text, and where the unsearched text begins."""

    def add(self, tokens: list[int]) -> None:
        """Adds new tokens; ignores those after the end of the reply."""
        for token in tokens:
            if self.is_done:
                return
            if token in self._stops:
                self.is_done, self._finish_reason = True, "stop"
                return
            self.tokens.append(token)
            self._decode()
            place = self._stop_place()
            if place is not None:
                self.text = self.text[:place]
                self.is_done, self._finish_reason = True, "stop"
            self.is_done = self.is_done or len(self.tokens) >= self._options.max_new_tokens

    def _decode(self) -> None:
        self.text = self._whole + self._codec.decode(self.tokens[self._num_whole :])
        if not self.text.endswith(BROKEN_CHARACTER):
            self._searched_from = len(self._whole)
            self._num_whole, self._whole = len(self.tokens), self.text

    def _stop_place(self) -> int | None:
        """Returns where the first stop text begins, or None. Searches new text and len(stop) characters before it."""
        places = (self.text.find(stop, max(0, self._searched_from - len(stop))) for stop in self._options.stop)
        return min((place for place in places if place >= 0), default=None)

    def new_piece(self) -> str:
        """Returns the text not shown yet that no later token can change: no half characters, no half stop text."""
        end = len(self.text)
        if not self.is_done:
            end = len(self.text.rstrip(BROKEN_CHARACTER))
            for stop in self._options.stop:
                half = next((n for n in range(len(stop) - 1, 0, -1) if self.text[:end].endswith(stop[:n])), 0)
                end = min(end, len(self.text[:end]) - half)
        piece = self.text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return piece

    def reply(self) -> Reply:
        return Reply(self.text, self.tokens, self._finish_reason)
