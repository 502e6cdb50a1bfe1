"""MMMU val (arXiv 2311.16502): 900 college questions, up to seven pictures each, options or an open answer.

Files: MMMU_DEV_VAL.tsv (VLMEvalKit; its dev rows are left out), or parquet of MMMU, split validation. Both profiles use
MMMU's own parser, which chooses a random option for a reply that names none. Here the item's index seeds that choice,
so that it is reproducible, and the reply counts as unparsed.
"""

import dataclasses
import itertools
import random
import re
from typing import Any

from oq2vl_jax.eval.answers import matches_open_answer, parse_open_reply
from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    ASK_SHORT,
    IMAGE,
    LETTERS,
    Benchmark,
    Item,
    Judgement,
    Profile,
    Prompt,
    chat_prompt,
    check_answers,
    choices_of,
    each_item,
    raw_prompt,
    without_markers,
)
from oq2vl_jax.eval.choices import parse_mmmu_choice
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given, literal_list

PUBLISHED_MAX_PICTURES = 5
"""The published harness uses at most five of the seven pictures. It fills the places of the text in order, whatever
their numbers are, and starts again with the first picture if there are more places."""
MARKER = re.compile(r"<image (\d)>")


def read(table: Table) -> list[Item]:
    return check_answers(read_tsv_rows(table) if table.is_tsv else read_parquet_rows(table))


def read_tsv_rows(table: Table) -> list[Item]:
    check_columns("mmmu", table, ("index", "question", "A", "answer", "image"))
    items = []
    for row in table.rows:
        if row.get("split") not in (None, "validation"):
            continue
        choices = choices_of(row, {letter: letter for letter in LETTERS[:9]})
        answer = str(row["answer"]) if choices else [str(text) for text in literal_list(row["answer"])]
        numbered = images_of(row["image"])
        question, images, is_placed = place_images(str(row["question"]), choices, numbered)
        categories = {"category": str(row["category"])} if is_given(row.get("category")) else {}
        facts: dict[str, Any] = {"has_placed_pictures": is_placed, "numbered": numbered}
        items.append(Item(str(row["index"]), question, images, answer, choices, facts, categories))
    return items


def read_parquet_rows(table: Table) -> list[Item]:
    check_columns("mmmu", table, ("id", "question", "options", "answer", "image_1", "question_type"))
    items = []
    for row in table.rows:
        is_open = row["question_type"] == "open"
        options = [] if is_open else literal_list(row["options"])
        choices = {LETTERS[i]: str(option) for i, option in enumerate(options)}
        answer = [str(text) for text in literal_list(row["answer"])] if is_open else str(row["answer"])
        numbered = [image for i in range(1, 8) for image in images_of(row.get(f"image_{i}"))]
        question, images, is_placed = place_images(str(row["question"]), choices, numbered)
        subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", str(row["id"]))
        facts: dict[str, Any] = {"has_placed_pictures": is_placed, "numbered": numbered}
        facts |= {"subfield": str(row["subfield"])} if is_given(row.get("subfield")) else {}
        items.append(Item(str(row["id"]), question, images, answer, choices, facts, {"category": subject}))
    return items


def place_images(question: str, choices: dict[str, str], images: list[bytes]) -> tuple[str, list[bytes], bool]:
    """Replaces each <image N> in question and options (`choices`, changed in place) by <image>.

    Returns (question, pictures in the order of the markers, whether pictures are placed). A marker of a missing picture
    takes the first one. Without markers the pictures are not placed and keep their order."""
    question = without_markers(question)
    wanted = MARKER.findall(question + "".join(choices.values()))
    if not wanted or not images:
        choices.update({letter: MARKER.sub("", text) for letter, text in choices.items()})
        return MARKER.sub("", question), images, False
    choices.update({letter: MARKER.sub(IMAGE, without_markers(text)) for letter, text in choices.items()})
    numbers = [int(number) - 1 for number in wanted]
    return MARKER.sub(IMAGE, question), [images[n if 0 <= n < len(images) else 0] for n in numbers], True


def prompt(item: Item, profile: Profile) -> Prompt:
    instruction = ASK_LETTER if item.choices else ASK_SHORT
    if profile == "official":
        return chat_prompt(item, item.question, instruction)._replace(options=tuple(item.choices))
    if item.facts.get("has_placed_pictures"):  # the published harness adds a line break after each
        choices = {letter: text.replace(IMAGE, f"{IMAGE}\n") for letter, text in item.choices.items()}
        item = dataclasses.replace(item, question=item.question.replace(IMAGE, f"{IMAGE}\n"), choices=choices)
    else:
        item = dataclasses.replace(item, question=f"{IMAGE}\n" * len(item.images) + item.question)
    subject = item.facts.get("subfield", item.categories.get("category", "")).replace("_", " ")
    head = f"The following are multiple choice questions about  {subject}.\n\n"
    asked = raw_prompt(item, head + item.question, instruction)
    numbered = item.facts.get("numbered", item.images)[:PUBLISHED_MAX_PICTURES]
    in_order = itertools.islice(itertools.cycle(numbered), asked.text.count(IMAGE))
    return asked._replace(images=tuple(in_order))


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    if item.choices:
        letter, is_found = parse_mmmu_choice(reply, item.choices, random.Random(item.index))
        return Judgement(float(letter == item.answer), letter if is_found else None)
    return Judgement(float(matches_open_answer(parse_open_reply(reply), item.answer)), reply.strip() or None)


BENCHMARK = Benchmark(
    "mmmu", ("MMMU_DEV_VAL.tsv", "*MMMU*/**/validation-*.parquet", "*mmmu*.parquet"), read, prompt, judge, each_item
)
