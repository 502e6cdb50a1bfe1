"""easy-VQA (Victor Zhou): 9,673 test questions about 64x64 pictures of a shape, 13 possible answers.

File: easy_vqa_test.parquet, written by python -m oq2vl_jax.demo.easy_vqa. A reply must equal the answer.
"""

from oq2vl_jax.eval.benchmark import (
    IMAGE,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    check_answers,
    each_item,
    without_markers,
)
from oq2vl_jax.eval.tables import Table, check_columns, images_of

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWERS = (*SHAPES, *COLORS, "yes", "no")


def read(table: Table) -> list[Item]:
    check_columns("easy_vqa", table, ("index", "question", "answer", "image"))
    choices = {answer: answer for answer in ANSWERS}
    items = [
        Item(
            str(row["index"]), str(row["question"]), images_of(row["image"]), str(row["answer"]), choices,
            categories={"category": kind_of(str(row["answer"]))},
        )
        for row in table.rows
    ]  # fmt: skip
    return check_answers(items)


def kind_of(answer: str) -> str:
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def prompt(item: Item, profile: Profile) -> Prompt:
    return Prompt(f"{IMAGE}\n{without_markers(item.question)}", max_new_tokens=8, options=ANSWERS)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    said = reply.strip().lower()
    return Judgement(float(said == item.answer), said if said in ANSWERS else None)


BENCHMARK = Benchmark("easy_vqa", ("easy_vqa_test.parquet",), read, prompt, judge, each_item)
