"""How conversations are written: one entry of CHAT_TEMPLATES a template (arXiv 2504.00595 and its code).

  open_qwen2vl            the published tuning template, exactly: no line break before "assistant", and the first turn
                          drops the token after an image (a rule meant for Llama, which applies because the turn begins
                          with <s>)
  open_qwen2vl_released   very likely the template of the released instruct weights, inferred from that code's history:
                          the images of the first turn precede everything, no line break before an answer
  chatml                  Qwen2.5's own template

A template returns items: text, ids of special tokens, and None for an image. Neighbouring texts are tokenised as one.
convert/export_files/chat_templates.py writes the same in Jinja, and a test compares the two token for token.
"""

from collections.abc import Callable
from typing import NamedTuple

IMAGE = "<image>"
"""Placeholder of an image in the text of a conversation."""
DEFAULT_SYSTEM = "You are a helpful assistant."
Items = list[str | int | None]
Turn = list[int | None]
"""Token ids, None for an image."""


class SpecialTokens(NamedTuple):
    bos: int
    eos: int
    pad: int
    end_of_chunk: int
    turn_start: int
    image: int


class ChatTemplate(NamedTuple):
    """human: (special, text, is_first, system) to the items of a question and of the header of its answer.
    assistant: (special, text) to (items, is_labelled) of the parts of an answer."""

    human: Callable[[SpecialTokens, str, bool, str], Items]
    assistant: Callable[[SpecialTokens, str], list[tuple[Items, bool]]]
    drops_tokens_after_images: bool = False
    """In the first turn, the token after every image."""


def chatml_human(special: SpecialTokens, text: str, is_first: bool, system: str) -> Items:
    header = system_items(special, system) if is_first else []
    return [*header, *question_items(special, text), "\n", special.turn_start, "assistant\n"]


def chatml_assistant(special: SpecialTokens, text: str) -> list[tuple[Items, bool]]:
    return [([*split_at_images(text), special.eos], True), (["\n"], False)]


def published_human(special: SpecialTokens, text: str, is_first: bool, system: str) -> Items:
    header = [special.bos, *system_items(special, system)] if is_first else []
    return [*header, *question_items(special, text), "assistant\n"]


def published_assistant(special: SpecialTokens, text: str) -> list[tuple[Items, bool]]:
    return [([*split_at_images(text or " "), special.eos, "\n"], True)]


def released_human(special: SpecialTokens, text: str, is_first: bool, system: str) -> Items:
    if not is_first:
        return [*question_items(special, text), "assistant"]
    images: Items = [None, "\n"] * text.count(IMAGE)
    question = [special.turn_start, f"user\n{text.replace(IMAGE, '')}", special.eos]
    return [*images, special.bos, *system_items(special, system), *question, "assistant"]


def system_items(special: SpecialTokens, system: str) -> Items:
    return [special.turn_start, f"system\n{system}", special.eos, "\n"]


def question_items(special: SpecialTokens, text: str) -> Items:
    return [special.turn_start, "user\n", *split_at_images(text), special.eos]


CHAT_TEMPLATES = {
    "open_qwen2vl": ChatTemplate(published_human, published_assistant, drops_tokens_after_images=True),
    "open_qwen2vl_released": ChatTemplate(released_human, published_assistant),
    "chatml": ChatTemplate(chatml_human, chatml_assistant),
}
"""Templates of conversations; template plain has none."""


def published_items(special: SpecialTokens, turns: list[str], system: str) -> Items:
    """Returns a prompt as the published code asks (get_prompt): human first and last, "assistant" at the end without a
    line break."""
    items: Items = [special.bos, *system_items(special, system)]
    for i, text in enumerate(turns):
        pieces = split_at_images(text.strip())
        if i % 2:
            items += [*(pieces if text.strip() else [" "]), special.eos, "\n"]
        else:
            items += [special.turn_start, "user\n", *pieces, special.eos]
            items.append("assistant\n" if i < len(turns) - 1 else "assistant")
    return items


def without_tokens_after_images(turn: Turn) -> Turn:
    return [token for i, token in enumerate(turn) if i == 0 or token is None or turn[i - 1] is not None]


def split_at_images(text: str) -> list[str | None]:
    """Splits 'a<image>b' into ['a', None, 'b']."""
    pieces = text.split(IMAGE)
    return [item for piece in pieces for item in (None, piece)][1:]
