"""What a benchmark is: how its rows become questions, how they are asked, how a reply is judged, how scores add up.

Two profiles, always named beside a number: `official` is what leaderboards mean, `open_qwen2vl` what the harness of
arXiv 2504.00595 computed (raw prompts, laxer matching). docs/evaluation.md lists the rules and where they differ.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from oq2vl_jax.data.text.codec import IMAGE
from oq2vl_jax.eval.tables import Table, is_given

Profile = Literal["official", "open_qwen2vl"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_LETTER = "Answer with the option's letter from the given choices directly."
ASK_SHORT = "Answer the question using a single word or phrase."
PUBLISHED_STOPS = (".", ",", "\n")
PUBLISHED_NEW_TOKENS = 16


@dataclass(frozen=True)
class Item:
    """A question. index: unique in its benchmark; answer: what the scorer compares with; choices: text by letter, empty
    for open questions; facts: other columns that the rules need; categories: what results are split by."""

    index: str
    question: str
    images: list[bytes]
    answer: Any
    choices: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why the row cannot be asked or judged; it counts as wrong and is named."""


class RowError(ValueError):
    """Why one row of a benchmark's files can not be asked or judged."""


class Prompt(NamedTuple):
    """text: with <image> where the pictures stand. options: score these instead of writing a reply. is_raw: a plain
    completion, whatever the checkpoint's template. images: in the order of their places, where it is not the item's."""

    text: str
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    is_raw: bool = False
    images: tuple[bytes, ...] | None = None


class Judgement(NamedTuple):
    """score: 0..1. parsed: what the reply was taken to say; None where the rules found no answer in it."""

    score: float
    parsed: str | None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. read: rows to items; prompt and judge: by profile; combine: the unit scores that the accuracy and
    its interval are taken over, with the item each stands for; extra: further metrics."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Table], list[Item]]
    prompt: Callable[[Item, Profile], Prompt]
    judge: Callable[[Item, str, Profile], Judgement]
    combine: Callable[[list[Item], list[Judgement], Profile], list[tuple[Item, float]]]
    extra: Callable[[list[Item], list[Judgement]], dict[str, float]] = lambda items, judgements: {}


def each_item(items: list[Item], judgements: list[Judgement], profile: Profile) -> list[tuple[Item, float]]:
    """Every item counts for itself."""
    return [(item, judgement.score) for item, judgement in zip(items, judgements, strict=True)]


def choices_of(row: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """{letter: text} of the options that a row has; columns: the column of each letter."""
    return {letter: str(row[column]) for letter, column in columns.items() if is_given(row.get(column))}


def check_answers(items: list[Item]) -> list[Item]:
    """The items, those with a problem that can never be right: an answer that is none of the options, an index that
    stands twice."""
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
    """have_pictures: <image> in them stands for one; else it is what an option says."""
    texts = choices if have_pictures else {letter: without_markers(text) for letter, text in choices.items()}
    return "".join(f"\n{letter}. {text}" for letter, text in texts.items())


def chat_prompt(item: Item, question: str, instruction: str, max_new_tokens: int = 64) -> Prompt:
    """The official form: a turn of a conversation, pictures first where neither question nor options place them."""
    return Prompt(f"{placed(item, question)}\n{instruction}", max_new_tokens)


def raw_prompt(item: Item, question: str, instruction: str) -> Prompt:
    """The published harness's form: a plain completion of few tokens that stops at punctuation."""
    text = f"{placed(item, question)}\n{instruction}\nAnswer:"
    return Prompt(text, PUBLISHED_NEW_TOKENS, PUBLISHED_STOPS, is_raw=True)


def placed(item: Item, question: str) -> str:
    """Question and options with the pictures in their places, or before them."""
    text = question + options_text(item.choices, item.facts.get("has_placed_pictures", False))
    return text if IMAGE in text else f"{IMAGE}\n" * len(item.images) + text


def without_markers(text: str) -> str:
    """A text of the files as text: what looks like a picture's place is none."""
    return text.replace(IMAGE, "<image-placeholder>")
