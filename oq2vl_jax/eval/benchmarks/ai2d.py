"""AI2D (arXiv 1603.07396), test split: 3,088 questions about diagrams.

Files: AI2D_TEST.tsv (VLMEvalKit), or parquet of lmms-lab/ai2d. The published harness takes the likeliest of the letters
A to D and evaluates test and validation questions together; here only the given files are evaluated.
"""

from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    LETTERS,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    RowError,
    check_answers,
    choices_of,
    each_item,
    raw_prompt,
    without_markers,
)
from oq2vl_jax.eval.choice_rules import judge_official, letter_of, official_prompt
from oq2vl_jax.eval.tables import Table, check_columns, images_of


def read(table: Table) -> list[Item]:
    check_columns("ai2d", table, ("question", "answer", "image", *(("index", "A") if table.is_tsv else ("options",))))
    items = []
    for number, row in enumerate(table.rows):
        if table.is_tsv:
            choices, answer = choices_of(row, {letter: letter for letter in LETTERS[:9]}), letter_of(row)
        else:
            choices = {LETTERS[i]: str(text) for i, text in enumerate(row["options"])}
            answer = letter_at(row["answer"], number)
        index = str(row.get("index", number))
        items.append(Item(index, str(row["question"]), images_of(row["image"]), answer, choices))
    return check_answers(items)


def letter_at(answer: object, number: int) -> str:
    """Converts the index of an option, from 0, to its letter: 2 -> "C". Raises RowError."""
    text = str(answer).strip()
    if not text.isdecimal() or int(text) >= len(LETTERS):
        raise RowError(f"the answer of row {number} is {answer!r}; expected the number of an option, from 0")
    return LETTERS[int(text)]


def prompt(item: Item, profile: Profile) -> Prompt:
    if profile == "official":
        return official_prompt(item)
    return raw_prompt(item, without_markers(item.question), ASK_LETTER)._replace(options=tuple("ABCD"))


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    return judge_official(item, reply) if profile == "official" else Judgement(float(reply == item.answer), reply)


BENCHMARK = Benchmark(
    "ai2d", ("AI2D_TEST.tsv", "*ai2d*/**/test-*.parquet", "*ai2d*.parquet"), read, prompt, judge, each_item
)
