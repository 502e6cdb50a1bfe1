"""Defines a benchmark: how rows become questions, how they are asked, how a reply is judged, how scores are combined.

There are two profiles, and every number names its own: `official` follows the rules of leaderboards, `open_qwen2vl`
those of the harness of arXiv 2504.00595 (raw prompts, laxer matching). docs/evaluation.md lists the rules and their
differences.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from oq2vl_jax.data.text.templates import IMAGE
from oq2vl_jax.eval.tables import Table, is_given

Profile = Literal["official", "open_qwen2vl"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_LETTER = "Answer with the option's letter from the given choices directly."
ASK_SHORT = "Answer the question using a single word or phrase."
PUBLISHED_STOPS = (".", ",", "\n")
PUBLISHED_NEW_TOKENS = 16


@dataclass(frozen=True)
class Item:
    """A question. index: unique in its benchmark; answer: the ground truth; choices: option text by letter, empty for
    open questions; facts: other columns that the rules need; categories: the groups that results are split by."""

    index: str
    question: str
    images: list[bytes]
    answer: Any
    choices: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why the row cannot be asked or judged; the item counts as wrong and is listed in bad_rows."""


class RowError(ValueError):
    """Raised for a row of a benchmark's files that cannot be asked or judged; the message is the reason."""


class Prompt(NamedTuple):
    """A prompt for an item. text: has <image> for each picture. options: texts to score instead of generating, with
    --method options or is_raw. is_raw: a plain completion, independent of the checkpoint's template. images: pictures
    in the order of the <image> markers; None for the item's images."""

    text: str
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    is_raw: bool = False
    images: tuple[bytes, ...] | None = None


class Judgement(NamedTuple):
    """A judged reply. score: 0..1. parsed: the answer in the reply; None if the rules found none."""

    score: float
    parsed: str | None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. read: rows to items; prompt and judge: depend on the profile; combine: returns the units (item,
    score) over which the accuracy and its interval are computed; extra: further metrics."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Table], list[Item]]
    prompt: Callable[[Item, Profile], Prompt]
    judge: Callable[[Item, str, Profile], Judgement]
    combine: Callable[[list[Item], list[Judgement], Profile], list[tuple[Item, float]]]
    extra: Callable[[list[Item], list[Judgement]], dict[str, float]] = lambda items, judgements: {}


def each_item(items: list[Item], judgements: list[Judgement], profile: Profile) -> list[tuple[Item, float]]:
    """Counts every item as one unit."""
    return [(item, judgement.score) for item, judgement in zip(items, judgements, strict=True)]


def choices_of(row: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Returns {letter: text} of the options that a row has. columns: the column of each letter."""
    return {letter: str(row[column]) for letter, column in columns.items() if is_given(row.get(column))}


def check_answers(items: list[Item]) -> list[Item]:
    """Returns the items. An item gets a problem if its answer is not among its options, or if its index occurred
    before."""
    seen: dict[str, int] = {}
    checked = []
    for item in items:
        number = seen[item.index] = seen.get(item.index, 0) + 1
        if item.choices and item.answer not in item.choices:
            problem = f"the answer is {item.answer!r}, the options are {', '.join(item.choices)}"
            item = dataclasses.replace(item, problem=item.problem or problem)
        if number > 1:
            problem = f"the index {item.index} stands in an earlier row as well"
            item = dataclasses.replace(item, index=f"{item.index} ({number})", problem=problem)
        checked.append(item)
    return checked


def options_text(choices: dict[str, str], have_pictures: bool = False) -> str:
    """Formats the options, one per line. have_pictures: <image> in an option is a picture; else it is escaped."""
    texts = choices if have_pictures else {letter: without_markers(text) for letter, text in choices.items()}
    return "".join(f"\n{letter}. {text}" for letter, text in texts.items())


def chat_prompt(item: Item, question: str, instruction: str, max_new_tokens: int = 64) -> Prompt:
    """Builds the official form: one turn of a conversation, pictures first unless question or options place them."""
    return Prompt(f"{placed(item, question)}\n{instruction}", max_new_tokens)


def raw_prompt(item: Item, question: str, instruction: str) -> Prompt:
    """Builds the published harness's form: a short plain completion that stops at punctuation."""
    text = f"{placed(item, question)}\n{instruction}\nAnswer:"
    return Prompt(text, PUBLISHED_NEW_TOKENS, PUBLISHED_STOPS, is_raw=True)


def placed(item: Item, question: str) -> str:
    """Returns question and options with <image> at the marked places, or in front if none is marked."""
    text = question + options_text(item.choices, item.facts.get("has_placed_pictures", False))
    return text if IMAGE in text else f"{IMAGE}\n" * len(item.images) + text


def without_markers(text: str) -> str:
    """Escapes <image> in a text of the files, so that it does not place a picture."""
    return text.replace(IMAGE, "<image-placeholder>")
