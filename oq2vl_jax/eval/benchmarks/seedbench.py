"""SEED-Bench, image part (arXiv 2307.16125): 14,233 questions with four options.

Files: SEEDBench_IMG.tsv (VLMEvalKit), or parquet of lmms-lab/SEED-Bench, split test; its video rows are left out.
"""

from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    Benchmark,
    Item,
    Profile,
    Prompt,
    check_answers,
    choices_of,
    each_item,
    raw_prompt,
    without_markers,
)
from oq2vl_jax.eval.choice_rules import judge, letter_of, official_prompt
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given


def read(table: Table) -> list[Item]:
    prefix = "" if table.is_tsv else "choice_"
    columns = {letter: letter if table.is_tsv else f"{prefix}{letter.lower()}" for letter in "ABCD"}
    index, category = ("index", "category") if table.is_tsv else ("question_id", "question_type_id")
    check_columns("seedbench", table, (index, "question", *columns.values(), "answer", "image"))
    rows = [row for row in table.rows if row.get("data_type", "image") == "image"]
    items = [
        Item(
            index=str(row[index]),
            question=str(row["question"]),
            images=images_of(row["image"]),
            answer=letter_of(row),
            choices=choices_of(row, columns),
            categories={"category": str(row[category])} if is_given(row.get(category)) else {},
        )
        for row in rows
    ]
    return check_answers(items)


def prompt(item: Item, profile: Profile) -> Prompt:
    if profile == "official":
        return official_prompt(item)
    return raw_prompt(item, without_markers(item.question), ASK_LETTER)


BENCHMARK = Benchmark(
    "seedbench", ("SEEDBench_IMG.tsv", "*SEED*/**/test-*.parquet", "*seedbench*.parquet"), read, prompt, judge,
    each_item,
)  # fmt: skip
