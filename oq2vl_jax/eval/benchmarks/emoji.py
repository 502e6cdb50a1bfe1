"""Emoji of oq2vl_jax.demo.emoji: what is this? Four names to choose from, at random or of the same group.

File: emoji_test.parquet. By options, the likeliest of the four names counts; a generated reply must equal the name.
Profile official asks in words; open_qwen2vl gives the picture alone, for checkpoints that have seen captions only.
"""

from oq2vl_jax.eval.benchmark import (
    IMAGE,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    check_answers,
    choices_of,
    each_item,
    without_markers,
)
from oq2vl_jax.eval.tables import Table, check_columns, images_of

COLUMNS = {letter: letter for letter in "ABCD"}


def read(table: Table) -> list[Item]:
    check_columns("emoji", table, ("index", "question", "image", *COLUMNS, "answer", "options", "concept"))
    items = [
        Item(
            str(row["index"]), str(row["question"]), images_of(row["image"]), str(row["answer"]),
            choices_of(row, COLUMNS),
            categories={"concept": str(row["concept"]), "concept and options": f"{row['concept']}; {row['options']}"},
        )
        for row in table.rows
    ]  # fmt: skip
    return check_answers(items)


def prompt(item: Item, profile: Profile) -> Prompt:
    names = tuple(item.choices.values())
    if profile == "open_qwen2vl":  # captions stand on a line of their own
        return Prompt(IMAGE, max_new_tokens=16, options=tuple(f"\n{name}" for name in names), is_raw=True)
    return Prompt(f"{IMAGE}\n{without_markers(item.question)}", max_new_tokens=16, options=names)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    said = reply.strip().lower()
    letter = next((letter for letter, name in item.choices.items() if name == said), None)
    return Judgement(float(letter == item.answer), letter)


BENCHMARK = Benchmark("emoji", ("emoji_test.parquet",), read, prompt, judge, each_item)
