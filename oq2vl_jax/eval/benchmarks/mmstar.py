"""MMStar (arXiv 2403.20330): 1,500 questions that cannot be answered without the picture, 6 categories of 3 skills.

Files: MMStar.tsv (VLMEvalKit), or parquet of Lin-Chen/MMStar, split val, with the options in the question.
"""

from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    IMAGE,
    PUBLISHED_NEW_TOKENS,
    PUBLISHED_STOPS,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    check_answers,
    choices_of,
    each_item,
    options_text,
    without_markers,
)
from oq2vl_jax.eval.choice_rules import judge_contained, judge_official, letter_of
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given


def read(table: Table) -> list[Item]:
    check_columns("mmstar", table, ("index", "question", "answer", "image"))
    items = []
    for row in table.rows:
        l2_category = row.get("l2_category") or row.get("l2-category")
        choices = choices_of(row, {letter: letter for letter in "ABCD"})
        question = str(row["question"])
        items.append(
            Item(
                index=str(row["index"]),
                question=question + (options_text(choices) if table.is_tsv else ""),
                images=images_of(row["image"]),
                answer=letter_of(row),
                choices=choices or options_in(question),
                categories={
                    name: str(value)
                    for name, value in (("category", row.get("category")), ("l2_category", l2_category))
                    if is_given(value)
                },
            )
        )
    return check_answers(items)


def options_in(question: str) -> dict[str, str]:
    """Parses options in a question, "A: cat, B: dog, ...". If one is missing, all get the NUL character as text."""
    choices = {}
    for i, letter in enumerate("ABCD"):
        _, marker, behind = question.rpartition(f"{letter}: ")
        if marker:
            following = "ABCD"[i + 1 : i + 2]
            text = behind.split(f"{following}: ")[0] if following else behind
            choices[letter] = text.strip().rstrip(",").strip()
    return choices if len(choices) == 4 else dict.fromkeys("ABCD", "\0")


def prompt(item: Item, profile: Profile) -> Prompt:
    images = f"{IMAGE}\n" * len(item.images)
    question = without_markers(item.question)
    if profile == "official":
        return Prompt(f"{images}{question}\n{ASK_LETTER}", options=tuple(item.choices))
    text = f"{images}Question: {question}\n{ASK_LETTER}\nAnswer:"
    return Prompt(text, PUBLISHED_NEW_TOKENS, PUBLISHED_STOPS, is_raw=True)


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    if profile == "official":
        return judge_official(item, reply)
    return judge_contained(item, reply, ignores_case=False)


BENCHMARK = Benchmark(
    "mmstar", ("MMStar.tsv", "*MMStar*/**/val-*.parquet", "*mmstar*.parquet"), read, prompt, judge, each_item
)
