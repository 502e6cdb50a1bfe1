"""Another benchmark: is the picture bright or dark? Save it as oq2vl_jax/eval/benchmarks/brightness.py; that is all.

File: brightness.parquet with the columns index, image and answer (bright or dark).
"""

from oq2vl_jax.eval.benchmark import Benchmark, Item, Judgement, Profile, Prompt, chat_prompt, check_answers, each_item
from oq2vl_jax.eval.tables import Table, check_columns, images_of

INSTRUCTION = "Answer with one word, bright or dark."


def read(table: Table) -> list[Item]:
    check_columns("brightness", table, ("index", "image", "answer"))
    rows = table.rows
    return check_answers([Item(str(r["index"]), "How is it?", images_of(r["image"]), r["answer"]) for r in rows])


def prompt(item: Item, profile: Profile) -> Prompt:
    return chat_prompt(item, item.question, INSTRUCTION, max_new_tokens=4)._replace(options=("bright", "dark"))


def judge(item: Item, reply: str, profile: Profile) -> Judgement:
    said = reply.strip().lower().rstrip(".")
    return Judgement(float(said == item.answer), said if said in ("bright", "dark") else None)


BENCHMARK = Benchmark("brightness", ("brightness.parquet",), read, prompt, judge, each_item)
