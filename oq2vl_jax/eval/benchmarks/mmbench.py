"""MMBench EN dev (arXiv 2307.06281), circular: a question is right only if every rotation of its options is answered
right. Rotation k has the index of the question + k * 1,000,000.

Files: MMBench_DEV_EN.tsv (VLMEvalKit), or parquet of lmms-lab/MMBench, split dev. The published harness counts every
rotation separately, omits the hint and always writes four options.
"""

from collections import defaultdict

from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    check_answers,
    choices_of,
    raw_prompt,
    without_markers,
)
from oq2vl_jax.eval.choice_rules import judge, letter_of, official_prompt
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given

COPY = 1_000_000
LETTERS = "ABCDE"


def read(table: Table) -> list[Item]:
    check_columns("mmbench", table, ("index", "question", "A", "B", "answer", "image"))
    items = []
    for row in table.rows:
        l2_category = row.get("l2-category") or row.get("L2-category")
        categories = {"category": row.get("category"), "l2_category": l2_category}
        items.append(
            Item(
                index=str(int(row["index"])),
                question=str(row["question"]),
                images=images_of(row["image"]),
                answer=letter_of(row),
                choices=choices_of(row, {letter: letter for letter in LETTERS}),
                facts={"hint": str(row["hint"])} if is_given(row.get("hint")) else {},
                categories={name: str(value) for name, value in categories.items() if is_given(value)},
            )
        )
    return check_answers(items)


def prompt(item: Item, profile: Profile) -> Prompt:
    if profile == "official":
        return official_prompt(item)
    four = Item(item.index, "", item.images, item.answer, {k: item.choices.get(k, "nan") for k in "ABCD"})
    return raw_prompt(four, without_markers(item.question), ASK_LETTER)


def combine(items: list[Item], judgements: list[Judgement], profile: Profile) -> list[tuple[Item, float]]:
    """Counts questions under `official`, rotations under `open_qwen2vl`. Rotations not in the file are not required."""
    if profile == "open_qwen2vl":
        return [(item, judgement.score) for item, judgement in zip(items, judgements, strict=True)]
    groups: dict[int, list[tuple[Item, float]]] = defaultdict(list)
    for item, judgement in zip(items, judgements, strict=True):
        groups[int(item.index) % COPY].append((item, judgement.score))
    firsts = [min(group, key=lambda pair: int(pair[0].index)) for group in groups.values()]
    return [(item, min(score for _, score in group)) for (item, _), group in zip(firsts, groups.values(), strict=True)]


def extra(items: list[Item], judgements: list[Judgement]) -> dict[str, float]:
    return {"every_copy_singly": sum(judgement.score for judgement in judgements) / len(judgements)}


FILES = ("MMBench_DEV_EN.tsv", "*MMBench*/en/dev-*.parquet", "*MMBench_EN*/**/dev-*.parquet", "*mmbench*.parquet")
BENCHMARK = Benchmark("mmbench", FILES, read, prompt, judge, combine, extra)
