"""POPE (arXiv 2305.10355): is the object in the picture? 9,000 questions; absent objects are chosen in three ways.

Files: POPE.tsv (VLMEvalKit), or parquet of lmms-lab/POPE, split test. A reply without a clear yes or no counts as
wrong, and as "no" in precision, recall, F1 and yes-rate (VLMEvalKit's rule).
"""

import dataclasses

from oq2vl_jax.eval.answers import yes_or_no
from oq2vl_jax.eval.benchmark import (
    ASK_SHORT,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    RowError,
    chat_prompt,
    check_answers,
    each_item,
    raw_prompt,
    without_markers,
)
from oq2vl_jax.eval.report import JOINED
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given


def read(table: Table) -> list[Item]:
    index = "index" if table.is_tsv else "id" if "id" in table.rows[0] else "question_id"
    check_columns("pope", table, (index, "question", "answer", "image"))
    items = []
    for row in table.rows:
        answer = str(row["answer"]).strip().lower()
        if answer not in ("yes", "no"):
            raise RowError(f"the answer is {row['answer']!r}; expected yes or no")  # read_items marks only this row
        categories = {"category": str(row["category"])} if is_given(row.get("category")) else {}
        name = str(row[index]) if index != "question_id" else f"{row[index]}-{row.get('category', '')}"
        items.append(Item(name, str(row["question"]), images_of(row["image"]), answer, categories=categories))
    return check_answers(items)


def prompt(item: Item, profile: Profile) -> Prompt:
    question = without_markers(item.question)
    if profile == "official":
        return chat_prompt(item, question, ASK_SHORT)._replace(options=("yes", "no"))
    return raw_prompt(item, f"Question: {question}", ASK_SHORT)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    if profile == "official":
        said = yes_or_no(reply)
    else:
        exact = reply.strip().strip(",").strip(".").strip().lower()
        said = exact if exact in ("yes", "no") else None
    return Judgement(float(said == item.answer), said)


def splits_of(item: Item) -> list[str]:
    """Returns the splits of an item. POPE.tsv holds a question of several splits once, as "popular,random"."""
    return item.categories.get("category", "").split(JOINED)


def combine(items: list[Item], judgements: list[Judgement], profile: Profile) -> list[tuple[Item, float]]:
    """Counts every row once; the published harness counts a row once per split."""
    if profile == "official":
        return each_item(items, judgements, profile)
    return [
        (dataclasses.replace(item, categories={"category": split} if split else {}), judgement.score)
        for item, judgement in zip(items, judgements, strict=True)
        for split in splits_of(item)
    ]


def extra(items: list[Item], judgements: list[Judgement]) -> dict[str, float]:
    """Returns VLMEvalKit's metrics over all rows, with "yes" as the positive class, and the mean of the splits' F1,
    which the published harness reports."""
    pairs = list(zip(items, judgements, strict=True))
    splits = sorted({split for item in items for split in splits_of(item)})
    f1s = [rates([pair for pair in pairs if split in splits_of(pair[0])])["f1"] for split in splits]
    return rates(pairs) | {"f1_mean_of_splits": sum(f1s) / len(f1s)}


def rates(pairs: list[tuple[Item, Judgement]]) -> dict[str, float]:
    said_yes = [judgement.parsed == "yes" for _, judgement in pairs]
    is_yes = [item.answer == "yes" for item, _ in pairs]
    hits = sum(said and true for said, true in zip(said_yes, is_yes, strict=True))
    precision, recall = hits / max(sum(said_yes), 1), hits / max(sum(is_yes), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_rate": sum(said_yes) / len(pairs),
    }


BENCHMARK = Benchmark(
    "pope", ("POPE.tsv", "*POPE*/**/test-*.parquet", "*pope*.parquet"), read, prompt, judge, combine, extra
)
