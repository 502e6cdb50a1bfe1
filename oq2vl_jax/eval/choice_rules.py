"""Defines prompts and scoring for lettered options, shared by MMBench, SEEDBench, MMStar and AI2D."""

from typing import Any

from oq2vl_jax.eval.benchmark import ASK_LETTER, Item, Judgement, Profile, Prompt, chat_prompt, without_markers
from oq2vl_jax.eval.choices import REFUSED, infer_choice


def official_prompt(item: Item) -> Prompt:
    """Builds the prompt: the hint if there is one, the question, the options, one line of instruction."""
    hint = item.facts.get("hint")
    question = without_markers(f"{hint}\n{item.question}" if hint else item.question)
    return chat_prompt(item, question, ASK_LETTER)._replace(options=tuple(item.choices))


def judge_official(item: Item, reply: str) -> Judgement:
    """Judges by the letter, or the text of one option, that VLMEvalKit's exact matching infers."""
    letter = infer_choice(reply, item.choices)
    parsed = None if letter == REFUSED else letter
    return Judgement(float(parsed == item.answer), parsed)


def judge_contained(item: Item, reply: str, ignores_case: bool) -> Judgement:
    """Judges as the published harness does: right if the answer's letter occurs anywhere in the reply."""
    text, letter = (reply.lower(), item.answer.lower()) if ignores_case else (reply, item.answer)
    return Judgement(float(letter in text), reply.strip() or None)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    return judge_official(item, reply) if profile == "official" else judge_contained(item, reply, ignores_case=True)


def letter_of(row: dict[str, Any]) -> str:
    return str(row["answer"]).strip()
