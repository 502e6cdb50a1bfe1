"""MathVista testmini (arXiv 2310.02255): 1,000 questions with options, a number, a list or a text as the answer.

Files: MathVista_MINI.tsv (VLMEvalKit), or parquet of AI4Math/MathVista, split testmini. The official score uses a judge
model to extract the answer from a reply. Here rules extract it; a reply in which they find no answer counts as unparsed
and is not mapped to the nearest option. The published harness parses every reply as an open answer.
"""

from typing import Any

from oq2vl_jax.eval.answers import last_number, matches_open_answer, parse_open_reply, to_number
from oq2vl_jax.eval.benchmark import (
    ASK_LETTER,
    ASK_SHORT,
    LETTERS,
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
from oq2vl_jax.eval.choices import REFUSED, infer_choice
from oq2vl_jax.eval.tables import Table, check_columns, images_of, is_given, literal_list

ASK_NUMBER = {
    "integer": "Answer the question using a single integer number.",
    "float": "Answer the question using a single floating-point number with {precision} decimal places.",
    "list": "Answer the question using a Python list.",
}


def read(table: Table) -> list[Item]:
    index, image = ("index", "image") if table.is_tsv else ("pid", "decoded_image")
    check_columns("mathvista", table, (index, "question", image, "choices", "answer", "question_type", "answer_type"))
    items = []
    for row in table.rows:
        is_choice = row["question_type"] == "multi_choice"
        options = literal_list(row["choices"]) if is_choice and row["choices"] is not None else []
        choices = {LETTERS[i]: str(text) for i, text in enumerate(options)}
        facts = {"answer_type": str(row["answer_type"]), "precision": number_of_places(row)}
        if is_given(row.get("unit")):
            facts["unit"] = str(row["unit"])
        metadata = row.get("metadata") or row
        category = {"category": str(metadata["task"])} if is_given(metadata.get("task")) else {}
        answer = answer_letter(row, choices, index) if choices else str(row["answer"])
        if not choices and facts["answer_type"] in ("integer", "float") and to_number(answer) is None:
            raise RowError(f"the answer of row {row[index]} is {answer!r}; expected a number")
        items.append(
            Item(str(row[index]), str(row["question"]), images_of(row[image]), answer, choices, facts, category)
        )
    return check_answers(items)


def number_of_places(row: dict[str, Any]) -> int:
    """Returns the number of decimal places to compare, 2 by default. The files store it as a float."""
    return max(0, int(float(row["precision"]))) if is_given(row.get("precision")) else 2


def answer_letter(row: dict[str, Any], choices: dict[str, str], index: str) -> str:
    """Returns the letter of the right option: answer_option, else the option equal to the answer. Raises RowError."""
    if is_given(row.get("answer_option")):
        return str(row["answer_option"])
    letters = [letter for letter, text in choices.items() if text == str(row["answer"])]
    if not letters:
        raise RowError(
            f"mathvista: the answer of row {row[index]} is {row['answer']!r}, its options are "
            f"{', '.join(choices.values())}."
        )
    return letters[0]


def prompt(item: Item, profile: Profile) -> Prompt:
    question = without_markers(item.question)
    if profile == "open_qwen2vl":
        return raw_prompt(item, question, ASK_LETTER if item.choices else ASK_SHORT)
    if "unit" in item.facts:
        question += f" (Unit: {item.facts['unit']})"
    ask = ASK_LETTER if item.choices else ASK_NUMBER.get(item.facts["answer_type"], ASK_SHORT)
    return chat_prompt(item, question, ask.format(precision=item.facts["precision"]))._replace(
        options=tuple(item.choices)
    )


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    if profile == "open_qwen2vl":
        is_right = matches_open_answer(parse_open_reply(reply), [item.answer])
        return Judgement(float(is_right), reply.strip() or None)
    if item.choices:
        letter = infer_choice(reply, item.choices) if reply.strip() else None
        parsed = None if letter == REFUSED else letter
        return Judgement(float(parsed == item.answer), parsed)
    kind, places = item.facts["answer_type"], item.facts["precision"]
    if kind in ("integer", "float"):
        number = last_number(reply)
        if number is None:
            return Judgement(0.0, None)
        said = str(int(number)) if kind == "integer" else f"{number:.{places}f}"
        expected = str(int(float(item.answer))) if kind == "integer" else f"{float(item.answer):.{places}f}"
        is_whole = kind == "float" or number == int(number)
        return Judgement(float(said == expected and is_whole), said if is_whole else str(number))
    said = reply.strip().rstrip(".").strip()
    if kind == "list":
        said, expected = said.replace(" ", ""), item.answer.replace(" ", "")
        return Judgement(float(said == expected), said or None)
    return Judgement(float(said.lower() == item.answer.lower()), said or None)


FILES = ("MathVista_MINI.tsv", "*MathVista*/**/testmini-*.parquet", "*mathvista*.parquet")
BENCHMARK = Benchmark("mathvista", FILES, read, prompt, judge, each_item)
