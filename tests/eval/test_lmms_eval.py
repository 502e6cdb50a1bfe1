"""lmms-eval end to end on local tasks, where it is installed (extra `lmms-eval`, 2.4 GB: not part of the suite).

pytest -m lmms_eval tests/eval/test_lmms_eval.py
"""

import json
import os
import subprocess
import sys

import pytest

from oq2vl_jax.generate.generator import Generator
from oq2vl_jax.generate.reply import SamplingOptions
from tests.eval import benchmark_files as files

pytestmark = pytest.mark.lmms_eval

TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
task: {name}
doc_to_visual: image
doc_to_text: "{{{{question}}}}"
{rest}
"""
GENERATE = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, do_sample: false, temperature: 0, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_local_tasks_end_to_end(checkpoint, tmp_path):
    pytest.importorskip("lmms_eval")
    generator = Generator(checkpoint)
    rows = []
    for i, name in enumerate(files.PHOTOS):
        question, choices = f"what is it, {i}?", ["a", "bc", "def"]
        reply = generator.ask(question, [files.photo(name)], SamplingOptions(6))
        request = [generator.encode_turns([f"<image>\n{question}"])]
        from oq2vl_jax.generate.generator import Request

        scores = generator.score(
            [Request(request[0], [files.photo(name)])], [[generator.codec.encode(choice) for choice in choices]]
        )[0]
        best = scores.index(max(scores))
        rows.append(
            {"question": question, "answer": reply if i else "something else", "choices": choices,
             "label": best if i else (best + 1) % 3, "image": files.cell(name)}
        )  # fmt: skip
    files.write_parquet(tmp_path, rows, "test.parquet")
    for name, rest in (("local_generate", GENERATE), ("local_choose", CHOOSE)):
        text = TASK.format(data=tmp_path / "test.parquet", name=name, rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-m", "lmms_eval", "--model", "oq2vl_jax", "--model_args", f"checkpoint={checkpoint}"]
    command += ["--tasks", "local_generate,local_choose", "--include_path", str(tmp_path), "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out"), "--verbosity", "DEBUG"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*results.json")
    results = json.loads(file.read_text())["results"]
    assert results["local_generate"]["exact_match,none"] == 0.75
    assert results["local_choose"]["acc,none"] == 0.75
