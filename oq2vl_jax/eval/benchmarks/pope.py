"""POPE (arXiv 2305.10355): is the object in the picture? 9,000 questions, three ways to choose the absent ones.

Files: POPE.tsv (VLMEvalKit), or parquet of lmms-lab/POPE, split test. A reply that says neither counts as wrong, and as
"no" in precision, recall, F1 and yes-rate (VLMEvalKit's rule).
"""

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
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given


def read(table: Table) -> list[Item]:
    index = "index" if table.is_tsv else "id" if "id" in table.rows[0] else "question_id"
    check_columns("pope", table, (index, "question", "answer", "image"))
    items = []
    for row in table.rows:
        answer = str(row["answer"]).strip().lower()
        if answer not in ("yes", "no"):
            raise RowError(f"the answer is {row['answer']!r}; expected yes or no")  # of this row alone
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


def extra(items: list[Item], judgements: list[Judgement]) -> dict[str, float]:
    """Over all rows together; "yes" is the positive answer."""
    said_yes = [judgement.parsed == "yes" for judgement in judgements]
    is_yes = [item.answer == "yes" for item in items]
    hits = sum(said and true for said, true in zip(said_yes, is_yes, strict=True))
    precision, recall = hits / max(sum(said_yes), 1), hits / max(sum(is_yes), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_rate": sum(said_yes) / len(items),
    }


BENCHMARK = Benchmark(
    "pope", ("POPE.tsv", "*POPE*/**/test-*.parquet", "*pope*.parquet"), read, prompt, judge, each_item, extra
)
