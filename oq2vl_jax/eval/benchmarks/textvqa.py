"""TextVQA val (arXiv 1904.08920): 5,000 questions about text in pictures, ten human answers each, VQA accuracy.

Files: TextVQA_VAL.tsv (VLMEvalKit), or parquet of lmms-lab/textvqa, split validation. The prompt has no OCR tokens.
"""

from oq2vl_jax.eval.answers import vqa_accuracy
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
from oq2vl_jax.eval.tables import Table, check_columns, images_of, literal_list

NUM_ANSWERS = 10


def read(table: Table) -> list[Item]:
    answers, index = ("answer", "index") if table.is_tsv else ("answers", "question_id")
    check_columns("textvqa", table, (index, "question", answers, "image"))
    items = [
        Item(
            str(row[index]), str(row["question"]), images_of(row["image"]),
            [str(answer) for answer in literal_list(row[answers])],
        )
        for row in table.rows
    ]  # fmt: skip
    empty = next((item.index for item in items if not item.answer), None)
    if empty is not None:
        raise RowError(f"row {empty} has no answers")
    return check_answers(items)


def prompt(item: Item, profile: Profile) -> Prompt:
    question = without_markers(item.question)
    if profile == "official":
        return chat_prompt(item, question.capitalize(), ASK_SHORT)
    return raw_prompt(item, f"Question: {question}", ASK_SHORT)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    if profile == "open_qwen2vl":
        reply = reply.replace("\n", "").replace(".", "").replace(",", "").lower()
    return Judgement(vqa_accuracy(reply, item.answer), reply.strip() or None)


BENCHMARK = Benchmark(
    "textvqa", ("TextVQA_VAL.tsv", "*textvqa*/**/validation-*.parquet", "*textvqa*.parquet"), read, prompt, judge,
    each_item,
)  # fmt: skip
