"""lmms-eval asks our server 50 questions about emoji in MMBench's layout; oq2vl_jax.eval asks the same checkpoint.

A small model is trained on questions of that form for two minutes, so that it answers with letters; that they are right
is not asked of it. Unlike the scripts beside it this one runs here; only lmms-eval runs in its environment.
"""

import base64
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

NUM_QUESTIONS = 50
NUM_STEPS = 150
NUM_CONCEPTS = 44
TASK = """task: emoji_as_mmbench
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function functions.visual
doc_to_text: !function functions.prompt
doc_to_target: answer
process_results: !function functions.mmbench_process_results
output_type: generate_until
generation_kwargs: {{max_new_tokens: 64, do_sample: false, temperature: 0, until: []}}
metric_list:
  - metric: gpt_eval_score
    aggregation: !function functions.mmbench_aggregate_dev_results_static
    higher_is_better: true
"""
FUNCTIONS = """from io import BytesIO

from lmms_eval.tasks.mmbench.en_utils import mmbench_aggregate_dev_results_static, mmbench_process_results
from PIL import Image


def visual(doc):
    return [Image.open(BytesIO(doc["image"]["bytes"])).convert("RGB")]


def prompt(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]
"""


def compare(python: str, folder: Path) -> tuple[dict[str, str], list[tuple[str, bool]]]:
    """(versions, cells) of lmms-eval in the environment of that interpreter."""
    folder.mkdir(parents=True)
    checkpoint = trained(folder)
    write_questions(folder)
    here = answers_here(folder, checkpoint)
    score, there = answers_there(python, folder, checkpoint)
    right = sum(one["score"] for one in here) / len(here)
    cells = [
        (f"accuracy of {len(here)} questions: {right:.2f} here, {score:.2f} there", round(right, 4) == round(score, 4)),
        ("the same replies", [one["reply"] for one in here] == there),
    ]
    code = "from importlib.metadata import version; print(version('lmms-eval'), version('openai'))"
    versions = subprocess.check_output([python, "-c", code], text=True).split()
    return dict(zip(("lmms-eval", "openai"), versions, strict=True)), cells


def trained(folder: Path) -> Path:
    """The run directory of a model that answers with letters."""
    from oq2vl_jax.config_files import load_config
    from oq2vl_jax.demo.emoji import EmojiConfig, write_emoji
    from oq2vl_jax.train.run import run

    write_emoji(EmojiConfig(str(folder / "emoji"), num_concepts=NUM_CONCEPTS))
    write_conversations(folder)
    tokenizer = folder / "emoji" / "tokenizer"
    words = f"--shards {folder}/letters.tar --out {folder}/packed --tokenizer {tokenizer} --num-tokens 256"
    words += " --max-images 8 --visual-tokens 16"
    subprocess.run([sys.executable, "-m", "oq2vl_jax.data.pack", *words.split()], check=True)
    bed = load_config("emoji")
    data = dataclasses.replace(
        bed.data, sources=(str(folder / "packed"),), num_tokens=256, max_images=8, template="open_qwen2vl"
    )
    no_held_out = dataclasses.replace(bed.held_out, sources=())
    run(dataclasses.replace(bed, data=data, held_out=no_held_out, run_dir=str(folder / "run"), num_steps=NUM_STEPS))
    return folder / "run"


def write_conversations(folder: Path) -> None:
    """A tar of the captions as questions with four names to choose from, asked as oq2vl_jax.eval asks MMBench's."""
    from webdataset import TarWriter

    rng = random.Random(0)
    with tarfile.open(folder / "emoji" / "captions" / "00000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()}
    names = {name.removesuffix(".txt"): text.decode() for name, text in files.items() if name.endswith(".txt")}
    with TarWriter(str(folder / "letters.tar"), mtime=0) as writer:
        for key, name in names.items():
            others = rng.sample(sorted(set(names.values()) - {name}), 3)
            options = rng.sample([name, *others], 4)
            question = text_of("What is this?", dict(zip("ABCD", options, strict=True)))
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": "ABCD"[options.index(name)]},
            ]
            row = {"image": f"{key}.png", "conversations": turns}
            writer.write({"__key__": key, "png": files[f"{key}.png"], "json": json.dumps(row).encode()})


def text_of(question: str, options: dict[str, str]) -> str:
    """The prompt of oq2vl_jax.eval for MMBench without its picture."""
    from oq2vl_jax.eval.benchmark import Item
    from oq2vl_jax.eval.choice_rules import official_prompt

    return official_prompt(Item("0", question, [b""], "A", options)).text.removeprefix("<image>\n")


def write_questions(folder: Path) -> None:
    """MMBench_DEV_EN.tsv for oq2vl_jax.eval, and the same rows with their prompts in a parquet file for lmms-eval."""
    import polars as pl

    from tests.eval.benchmark_files import write_tsv

    known = pl.read_parquet(folder / "emoji" / "test" / "emoji_test.parquet").rows(named=True)[:NUM_QUESTIONS]
    rows = [
        {"index": number, "question": row["question"], **{letter: row[letter] for letter in "ABCD"},
         "answer": row["answer"], "hint": "nan", "category": row["group"], "L2-category": row["concept"],
         "source": "emoji", "split": "dev"}
        for number, row in enumerate(known)
    ]  # fmt: skip
    pictures = [row["image"] for row in known]
    encoded = [base64.b64encode(picture["bytes"]).decode() for picture in pictures]
    write_tsv(folder / "mmbench", [row | {"image": image} for row, image in zip(rows, encoded, strict=True)],
              "MMBench_DEV_EN.tsv")  # fmt: skip
    prompts = [text_of(row["question"], {letter: row[letter] for letter in "ABCD"}) for row in rows]
    table = [row | {"image": i, "prompt": p} for row, i, p in zip(rows, pictures, prompts, strict=True)]
    (folder / "task").mkdir()
    pl.DataFrame(table).write_parquet(folder / "task" / "questions.parquet")
    (folder / "task" / "functions.py").write_text(FUNCTIONS)
    (folder / "task" / "emoji_as_mmbench.yaml").write_text(TASK.format(data=folder / "task" / "questions.parquet"))


def answers_here(folder: Path, checkpoint: Path) -> list[dict]:
    command = [sys.executable, "-m", "oq2vl_jax.eval", "--checkpoint", str(checkpoint), "--tasks", "mmbench", "--data",
               str(folder / "mmbench"), "--out", str(folder / "here"), "--method", "generate"]  # fmt: skip
    subprocess.run(command, check=True)
    lines = (folder / "here" / "mmbench" / "predictions.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda one: int(one["index"]))


def answers_there(python: str, folder: Path, checkpoint: Path) -> tuple[float, list[str]]:
    """(share of right answers, replies in order) of lmms-eval, which asks our server."""
    with serving(checkpoint) as address:
        command = [python, "-m", "lmms_eval", "--model", "openai", "--model_args",
                   f"model_version=run,base_url={address}/v1,api_key=none,timeout=60", "--tasks", "emoji_as_mmbench",
                   "--include_path", str(folder / "task"), "--batch_size", "1", "--output_path", str(folder / "there"),
                   "--log_samples"]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        subprocess.run(command, check=True, env=os.environ | offline)
    written = [json.loads(file.read_text()) for file in (folder / "there").rglob("*results.json")]
    (results,) = (one["results"] for one in written if "results" in one)  # another file is MMBench's own
    score = results["emoji_as_mmbench"]["gpt_eval_score,none"] / 100
    (samples,) = (folder / "there").rglob("*samples*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return score, [row["gpt_eval_score"]["prediction"] for row in rows]


@contextlib.contextmanager
def serving(checkpoint: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "oq2vl_jax.serve", "--checkpoint", str(checkpoint), "--port",
               address.rsplit(":", 1)[1]]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
                break
            time.sleep(0.5)
        else:
            raise TimeoutError("the server does not answer within two minutes")
        yield address
    finally:
        server.terminate()
        server.wait(30)
