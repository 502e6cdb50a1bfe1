"""Parses and compares open answers by pure text rules: yes or no, numbers, short texts, VQA accuracy. The sources are
those of choices.py and EvalAI's VQA evaluation."""

import math
import re
from collections.abc import Iterable

CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
WITH_APOSTROPHE = {word.replace("'", ""): word for word in CONTRACTIONS.split()}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGIT_OF = {word: str(digit) for digit, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e5
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
NUM_ANNOTATORS_FOR_FULL_SCORE = 3
MAX_PERIODS = 32
"""The official functions remove no more than these, because they pass re.UNICODE (32) as the count."""


def yes_or_no(reply: str) -> str | None:
    """Returns "yes" or "no" if the reply has exactly one of the two words, else None (VLMEvalKit's POPE)."""
    words = without_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def without_punctuation(text: str, keeps_period_after_digit: bool = True) -> str:
    """Removes punctuation by the VQA evaluation's rule. A mark is deleted if it occurs next to a space or the text has
    a number like 1,000; else it becomes a space. A period is deleted unless a digit follows it, or precedes it if
    keeps_period_after_digit."""
    has_thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_beside_space or has_thousands else " ")
    period = r"(?<!\d)\.(?!\d)" if keeps_period_after_digit else r"\.(?!\d)"
    return re.sub(period, "", cleaned, count=MAX_PERIODS)


def normalize_vqa_answer(text: str) -> str:
    """Applies EvalAI's normalisation for TextVQA: case, punctuation, articles, number words, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), keeps_period_after_digit=False)
    words = [DIGIT_OF.get(word, word) for word in text.split()]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Iterable[str]) -> float:
    """Returns the mean over annotators of min(1, n / 3), n = how many others gave the reply (VQA, TextVQA)."""
    normalized, wanted = [normalize_vqa_answer(answer) for answer in answers], normalize_vqa_answer(reply)
    scores = [
        min(1.0, sum(other == wanted for j, other in enumerate(normalized) if j != i) / NUM_ANNOTATORS_FOR_FULL_SCORE)
        for i in range(len(normalized))
    ]
    return sum(scores) / len(scores)


def parse_open_reply(reply: str) -> list[str | float]:
    """Parses as MMMU does: per line the shortest text after words such as "is" or "answer", else the whole reply, and
    all numbers in these texts; everything is normalised."""
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    pieces = []
    for i, line in enumerate(lines):
        behind = [
            line.split(indicator)[-1].strip()
            for indicator in INDICATORS + (("=",) if i == len(lines) - 1 else ())
            if indicator in line
        ]
        shortest = min(behind, key=len, default="")
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            pieces.append(shortest)
    pieces = pieces or [reply]
    numbers = [number for piece in pieces for pattern in NUMBERS for number in re.findall(pattern, piece)]
    return [value for piece in pieces + numbers for value in normalize_open_answer(piece)]


def normalize_open_answer(text: str) -> list[str | float]:
    """Returns the number rounded to two places, or the text in lower case. A single character x becomes " x"
    and "x ", so that it matches only beside a space."""
    text = text.strip()
    number = to_number(text)
    if number is not None:
        return [round(number, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def matches_open_answer(parsed: list[str | float], answers: Iterable[str]) -> bool:
    """Compares as MMMU does: an answer's text occurs in a parsed text, or its number equals a parsed number."""
    wanted = [value for answer in answers for value in normalize_open_answer(answer)]
    return any(
        any(isinstance(want, str) and want in value for want in wanted) if isinstance(value, str) else value in wanted
        for value in parsed
    )


def to_number(text: str) -> float | None:
    """Parses a number: 1,200 -> 1200.0. Returns None for other text."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def last_number(reply: str) -> float | None:
    """Returns the last number of a reply: "The answer is 12 cm." -> 12.0. None without one, or if it is not finite."""
    numbers = re.findall(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+", reply)
    number = to_number(numbers[-1]) if numbers else None
    return number if number is not None and math.isfinite(number) else None
