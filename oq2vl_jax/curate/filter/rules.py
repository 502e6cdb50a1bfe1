"""Makes the rules of filter expressions: tests over columns of metadata and scores.

    basic                          every basic rule of the config file
    language(en)  language(en, 0.5)   fastText's most likely language of the text, with a least probability
    words(>= 3)  characters(>= 6)  of the text
    short_side(>= 200)  aspect(<= 3)
    clip_l14(>= 0.243)  clip_l14_top(0.3)  clip_l14_top(0.3, exact)  a threshold, a top fraction; also clip_b32, clip
    mlm(semantic_understanding >= 85)  mlm_top(semantic_understanding, 0.2)
    score(COLUMN >= X)  top(COLUMN, FRACTION)  any column of the score files
    uids(FILE.npy)                 membership

A top fraction of a CLIP score selects as DataComp does, uid for uid: n is the fraction of all samples, rounded down,
and the threshold is the score at index n, from 0, of the descending scores. So n + 1 samples are kept, and all ties
with the last one. `exact` keeps n. `mlm_top` and `top` always keep n, because integer scores have many ties; n is then
the fraction of the samples that have the score. A hash of uid and seed chooses among ties, independent of the order of
the files. A rule about a score never keeps a sample without it. Scores are compared in the type of their column,
float32 in DataComp's files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oq2vl_jax.bounds import CountOrZero, Positive
from oq2vl_jax.curate.filter.expression import Leaf
from oq2vl_jax.curate.mlm_metrics import METRICS
from oq2vl_jax.errors import UserError, hint

CLIP_COLUMNS = {
    "clip_l14": "clip_l14_similarity_score",
    "clip_b32": "clip_b32_similarity_score",
    "clip": "clip_score",
}
TEXT_AND_SIZE = ("language", "words", "characters", "short_side", "aspect")
NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
COMPARISON = re.compile(r"(>=|<=|>|<)\s*" + NUMBER)
SCORE_COMPARISON = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*" + NUMBER)
TOP = re.compile(r"(?:(\w+)\s*,\s*)?(\d*\.?\d+)(\s*,\s*exact)?")
NOT_BLANK, BLANK = r"[^\s\x1c-\x1f]", r"[\s\x1c-\x1f]"
"""Word characters and separators as in str.split: Unicode's white space and the four separators of ASCII."""


@dataclass(frozen=True)
class Basic:
    """DataComp's basic filter: English, more than 2 words and 5 characters, short side from 200, aspect at most 3."""

    language: str | None = "en"
    min_words: CountOrZero = 3
    min_characters: CountOrZero = 6
    min_short_side: CountOrZero = 200
    max_aspect: Positive = 3.0

    @property
    def leaves(self) -> list[Leaf]:
        rules = [
            Leaf("words", f">= {self.min_words}"),
            Leaf("characters", f">= {self.min_characters}"),
            Leaf("short_side", f">= {self.min_short_side}"),
            Leaf("aspect", f"<= {self.max_aspect}"),
        ]
        return rules + ([Leaf("language", self.language)] if self.language else [])


@dataclass(frozen=True)
class Rule:
    """One rule ready to be applied. columns: the columns that it reads. column: its score column, or None.

    top: the fraction to keep. test: takes a function that returns a column by its name, and returns a boolean column
    (Polars expressions for text and sizes, numpy arrays for scores). uids: a file; membership is tested outside Polars.
    A language rule has neither top, test nor uids.
    """

    leaf: Leaf
    columns: tuple[str, ...]
    test: Callable[[Callable[[str], Any]], Any] | None = None
    column: str | None = None
    top: float | None = None
    has_exact_top: bool = False
    is_of_all: bool = False
    """The fraction is of all samples, not of those that have the score."""
    threshold: float | None = None
    uids: str | None = None


def make_rule(leaf: Leaf) -> Rule:
    """Makes the rule for a leaf. Raises UserError for an unknown name or arguments that do not fit it."""
    name, arguments = leaf.name, leaf.arguments
    if name in TEXT_AND_SIZE:
        return text_or_size_rule(leaf)
    if name == "uids":
        if not arguments:
            raise UserError("expression: uids: expected a file, like uids(dfn.npy).")
        return Rule(leaf, (), uids=arguments)
    if name in CLIP_COLUMNS:
        operator, number = matched(COMPARISON, leaf, "(>= 0.28)")
        return threshold_rule(leaf, CLIP_COLUMNS[name], operator, number)
    if name.removesuffix("_top") in CLIP_COLUMNS:
        return top_rule(leaf, CLIP_COLUMNS[name.removesuffix("_top")], has_exact_top=False)
    if name in ("mlm", "score"):
        column, operator, number = matched(SCORE_COMPARISON, leaf, "(semantic_understanding >= 85)")
        check_metric(leaf, column)
        return threshold_rule(leaf, column, operator, number)
    if name in ("mlm_top", "top"):
        column = matched(TOP, leaf, "(semantic_understanding, 0.2)")[0]
        check_metric(leaf, column)
        return top_rule(leaf, column, has_exact_top=True)
    known = [*TEXT_AND_SIZE, "basic", "uids", *CLIP_COLUMNS, *(f"{name}_top" for name in CLIP_COLUMNS)]
    known += ["mlm", "mlm_top", "score", "top"]
    raise UserError(f"expression: {leaf}: no such rule{hint(name, known)}; there are {', '.join(known)}.")


def text_or_size_rule(leaf: Leaf) -> Rule:
    if leaf.name == "language":
        if not re.fullmatch(r"[a-z]{2,3}(\s*,\s*[01]?(\.\d+)?)?", leaf.arguments):
            raise UserError(f"expression: {leaf}: expected a language code such as language(en), or language(en, 0.5).")
        return Rule(leaf, ("text",))
    operator, number = matched(COMPARISON, leaf, "(>= 3)")
    if leaf.name in ("short_side", "aspect"):
        columns: tuple[str, ...] = ("original_width", "original_height")
    else:
        columns = ("text",)

    def value(column: Callable[[str], Any]) -> Any:
        import polars as pl

        if leaf.name == "words":
            return column("text").str.count_matches(f"{NOT_BLANK}+")
        if leaf.name == "characters":
            return column("text").str.len_chars()
        sides = [column(name).cast(pl.Float64, strict=False) for name in columns]
        is_number = [side.is_not_null() & side.is_not_nan() for side in sides]
        is_known = is_number[0] & is_number[1] & (pl.min_horizontal(sides) > 0)
        shorter, longer = pl.min_horizontal(sides), pl.max_horizontal(sides)
        return pl.when(is_known).then(shorter if leaf.name == "short_side" else longer / shorter)

    if leaf.name == "words" and operator == ">=" and re.fullmatch(r"[1-9]\d?", number):
        enough = NOT_BLANK + f"{BLANK}+{NOT_BLANK}+" * (int(number) - 2) + f"{BLANK}+{NOT_BLANK}" * (int(number) > 1)
        return Rule(
            leaf, columns, lambda column: column("text").str.contains(enough)
        )  # takes a third of the time of counting
    return Rule(leaf, columns, lambda column: compare(value(column), operator, float(number)))


def threshold_rule(leaf: Leaf, column: str, operator: str, number: str) -> Rule:
    threshold = float(number)
    return Rule(
        leaf,
        (column,),
        lambda columns: compare(columns(column), operator, threshold),
        column=column,
        threshold=threshold,
    )


def top_rule(leaf: Leaf, column: str, has_exact_top: bool) -> Rule:
    named, number, exact = matched(TOP, leaf, "(0.3)")
    if named and not has_exact_top:
        raise UserError(
            f"expression: {leaf}: {leaf.name} takes the fraction alone; top({named}, {number}) names a column."
        )
    fraction = float(number)
    if not 0 < fraction <= 1:
        raise UserError(f"expression: {leaf}: the fraction must be above 0 and at most 1.")
    if exact and has_exact_top:
        raise UserError(f"expression: {leaf}: {leaf.name} is exact always; leave the word out.")
    return Rule(
        leaf,
        (column,),
        column=column,
        top=fraction,
        has_exact_top=has_exact_top or bool(exact),
        is_of_all=not has_exact_top,
    )


def compare(value: Any, operator: str, number: float) -> Any:
    if operator == ">=":
        return value >= number
    if operator == "<=":
        return value <= number
    return value > number if operator == ">" else value < number


def matched(pattern: re.Pattern, leaf: Leaf, example: str) -> tuple[str, ...]:
    match = pattern.fullmatch(leaf.arguments)
    if not match:
        raise UserError(f"expression: {leaf}: expected something like {leaf.name}{example}.")
    return match.groups()


def check_metric(leaf: Leaf, column: str | None) -> None:
    if column is None:
        raise UserError(f"expression: {leaf}: expected a column and a fraction, like {leaf.name}(column, 0.2).")
    if leaf.name.startswith("mlm") and column not in METRICS:
        raise UserError(f"expression: {leaf}: no such metric{hint(column, METRICS)}; there are {', '.join(METRICS)}.")
