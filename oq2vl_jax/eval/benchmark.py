"""What a benchmark is: how its rows become questions, how they are asked, how a reply is judged, how scores add up.

Two profiles, always named beside a number: `official` is what leaderboards mean, `open_qwen2vl` what the harness of
arXiv 2504.00595 computed (raw prompts, laxer matching). docs/evaluation.md lists the rules and where they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from oq2vl_jax.data.text import IMAGE
from oq2vl_jax.errors import UserError
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


class Prompt(NamedTuple):
    """text: with <image> where the pictures stand. options: score these instead of writing a reply. is_raw: a plain
    completion, whatever the checkpoint's template."""

    text: str
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    is_raw: bool = False


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


def check_answers(task: str, items: list[Item]) -> list[Item]:
    """The items. Raises UserError for an answer that is none of the options, and for an index that stands twice."""
    wrong = [item for item in items if item.choices and item.answer not in item.choices]
    if wrong:
        raise UserError(
            f"{task}: the answer of row {wrong[0].index} is {wrong[0].answer!r}, its options are "
            f"{', '.join(wrong[0].choices)} ({len(wrong)} such rows)."
        )
    seen: set[str] = set()
    double = next((item.index for item in items if item.index in seen or seen.add(item.index)), None)
    if double is not None:
        raise UserError(f"{task}: the index {double} stands in two rows.")
    return items


def options_text(choices: dict[str, str]) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in choices.items())


def chat_prompt(item: Item, question: str, instruction: str, max_new_tokens: int = 64) -> Prompt:
    """The official form: a turn of a conversation, pictures first where the question does not place them."""
    images = "" if IMAGE in question else f"{IMAGE}\n" * len(item.images)
    text = f"{images}{question}{options_text(item.choices)}\n{instruction}"
    return Prompt(text, max_new_tokens, options=())


def raw_prompt(item: Item, question: str, instruction: str) -> Prompt:
    """The published harness's form: a plain completion of few tokens that stops at punctuation."""
    images = "" if IMAGE in question else f"{IMAGE}\n" * len(item.images)
    text = f"{images}{question}{options_text(item.choices)}\n{instruction}\nAnswer:"
    return Prompt(text, PUBLISHED_NEW_TOKENS, PUBLISHED_STOPS, is_raw=True)


def without_markers(text: str) -> str:
    """A text of the files as text: what looks like a picture's place is none."""
    return text.replace(IMAGE, "<image-placeholder>")
