"""The whole evaluation: files, checkpoint, results; interrupted at random and continued."""

import dataclasses
import json
import random
from types import SimpleNamespace

import polars as pl
import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.eval import evaluate as evaluation
from oq2vl_jax.eval.benchmark import Prompt
from oq2vl_jax.eval.eval_config import EvalConfig, check
from oq2vl_jax.eval.evaluate import evaluate, summary_line
from oq2vl_jax.eval.report import bootstrap_interval
from oq2vl_jax.generate.generator import Generator, Request
from tests.eval import benchmark_files as files

NUM_ITEMS = 1000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return files.write_parquet_files(tmp_path_factory.mktemp("benchmarks"))


def test_tasks_of_every_kind_give_results_predictions_and_a_page(checkpoint, data, tmp_path):
    config = EvalConfig(checkpoint, "pope,mmmu,textvqa", str(data), str(tmp_path / "out"), batch_size=4)
    results = evaluate(config)
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    for name, result in results.items():
        low, high = result["interval_95"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
        assert (result["profile"], result["method"], result["checkpoint"]) == (
            "official",
            "generate",
            result["checkpoint"],
        )
        assert len(result["data_sha256"]) == 64
        predictions = [json.loads(line) for line in (tmp_path / "out" / name / "predictions.jsonl").open()]
        assert len(predictions) == result["num_items"]
        assert result["accuracy"] == pytest.approx(sum(p["score"] for p in predictions) / len(predictions))
        page = (tmp_path / "out" / name / "mistakes.html").read_text()
        assert "data:image/jpeg;base64" in page
    assert set(results["pope"]["metrics"]) == {"precision", "recall", "f1", "f1_mean_of_splits", "yes_rate"}
    assert results["mmmu"]["by_category"]["category"].keys() == {"Art_Theory", "Math"}


@pytest.mark.parametrize(
    ("is_raw", "options", "method", "expected"),
    [(True, ("a", "b"), "generate", "b"), (True, (), "generate", "said"), (False, ("a", "b"), "generate", "said"),
     (False, ("a", "b"), "options", "b")],
)  # fmt: skip
def test_options_are_scored_if_asked_or_if_the_published_harness_does(is_raw, options, method, expected):
    class Stub:
        codec = SimpleNamespace(encode=list)
        score = staticmethod(lambda requests, encoded: [[float(i) for i in range(len(row))] for row in encoded])
        generate = staticmethod(lambda requests, sampling: [SimpleNamespace(text=" said ") for _ in requests])

    config = EvalConfig("none", "ai2d", "none", "none", method=method, batch_size=2)
    prompts = [Prompt("?", is_raw=is_raw, options=options)]
    (answer,) = evaluation.ask(Stub(), prompts, [Request([1], [])], config)
    assert (answer.reply, answer.scores) == (expected, [0.0, 1.0] if expected == "b" else None)


def test_options_are_scored_and_the_published_profile_is_raw(checkpoint, data, tmp_path):
    by_options = evaluate(EvalConfig(checkpoint, "ai2d", str(data), str(tmp_path / "a"), method="options"))
    assert by_options["ai2d"]["unparsed_rate"] == 0
    published = evaluate(EvalConfig(checkpoint, "ai2d", str(data), str(tmp_path / "b"), profile="open_qwen2vl"))
    assert published["ai2d"]["unparsed_rate"] == 0, "the likeliest of the letters"
    with pytest.raises(UserError, match="textvqa has questions without options"):
        evaluate(EvalConfig(checkpoint, "textvqa", str(data), str(tmp_path / "c"), method="options"))


def many_questions(folder, count=NUM_ITEMS):
    rng = random.Random(0)
    rows = [
        {"index": f"{i}", "question": "is there " + "x" * rng.randrange(40), "answer": rng.choice(["yes", "red"]),
         "image": files.cell(rng.choice(files.PHOTOS))} for i in range(count)
    ]  # fmt: skip
    files.write_parquet(folder, rows, "easy_vqa_test.parquet")
    return str(folder)


def test_an_evaluation_of_1000_items_interrupted_at_random_ends_in_the_same_results(checkpoint, tmp_path, monkeypatch):
    data = many_questions(tmp_path / "data")
    generators = {}
    monkeypatch.setattr(evaluation, "Generator", lambda *args: generators.setdefault(args, Generator(*args)))
    config = EvalConfig(checkpoint, "easy_vqa", data, str(tmp_path / "whole"), batch_size=64)
    evaluate(config)

    rng, real_ask = random.Random(1), evaluation.ask
    config = EvalConfig(checkpoint, "easy_vqa", data, str(tmp_path / "parts"), batch_size=64)
    asked = 0

    def ask(*args):
        nonlocal asked
        if rng.random() < 0.25:
            raise KeyboardInterrupt
        asked += 1
        return real_ask(*args)

    monkeypatch.setattr(evaluation, "ask", ask)
    interruptions = 0
    while True:
        try:
            evaluate(config)
            break
        except KeyboardInterrupt:
            interruptions += 1
            with (tmp_path / "parts/easy_vqa/replies.jsonl").open("a") as file:
                file.write('{"index": "3", "re')  # what a kill in the middle of a line leaves
    assert interruptions > 2
    assert asked == -(-NUM_ITEMS // 64), "no finished batch is asked again"
    for name in ("results.json", "easy_vqa/predictions.jsonl", "easy_vqa/mistakes.html"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_image_that_does_not_decode_counts_as_wrong_and_is_listed(checkpoint, tmp_path):
    folder = tmp_path / "data"
    many_questions(folder, 6)
    frame = pl.read_parquet(folder / "easy_vqa_test.parquet")
    rows = frame.to_dicts()
    rows[2]["image"] = {"bytes": b"no picture", "path": "x"}
    rows[4]["answer"] = "none of the options"
    files.write_parquet(folder, rows, "easy_vqa_test.parquet")
    config = EvalConfig(checkpoint, "easy_vqa", str(folder), str(tmp_path / "out"), batch_size=4, method="options")
    result = evaluate(config)["easy_vqa"]
    assert list(result["unreadable_images"]) == ["2"]
    assert result["num_items"] == 6
    lines = [json.loads(line) for line in (tmp_path / "out/easy_vqa/predictions.jsonl").open()]
    assert lines[2]["score"] == 0
    assert "it is damaged or none of" in lines[2]["image_problem"]
    assert "the answer is 'none of the options'" in lines[4]["row_problem"]
    assert lines[4]["score"] == 0


def test_results_of_other_settings_are_not_mixed(checkpoint, data, tmp_path):
    config = EvalConfig(checkpoint, "pope", str(data), str(tmp_path / "out"), batch_size=4)
    evaluate(config)
    with pytest.raises(UserError, match="holds an evaluation with another limit; choose another folder"):
        evaluate(EvalConfig(checkpoint, "pope", str(data), str(tmp_path / "out"), batch_size=4, limit=2))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("mmbnch", "no benchmark 'mmbnch'.*did you mean 'mmbench'"), ("", "--tasks is empty"), ("pope,pope", "twice")],
)
def test_tasks_that_do_not_exist_get_a_hint(tasks, message):
    with pytest.raises(UserError, match=message):
        check(EvalConfig("c", tasks, "d", "o"))


def test_the_interval_is_that_of_the_binomial():
    scores = pl.Series([1.0] * 700 + [0.0] * 300).to_numpy()
    low, high = bootstrap_interval(scores)
    assert (low, high) == pytest.approx((0.7 - 0.0284, 0.7 + 0.0284), abs=0.003)


def test_results_say_whether_training_pictures_were_compared(checkpoint, data, tmp_path):
    """What curate.overlap found is in the results; of other files of the benchmark it is refused."""
    config = EvalConfig(checkpoint, "pope", str(data), str(tmp_path / "out"), batch_size=4, limit=4)
    result = evaluate(config)["pope"]
    assert result["overlap"] is None
    assert "overlap with the training data not checked" in summary_line("pope", result)
    (tmp_path / "overlap").mkdir()
    found = {"data_sha256": result["data_sha256"], "pictures": 9, "overlapping": 2, "same_bytes": 1}
    file = tmp_path / "overlap" / "report.json"
    file.write_text(json.dumps({"benchmarks": {"pope": found}}))
    checked = dataclasses.replace(config, overlap=str(tmp_path / "overlap"))
    result = evaluate(checked)["pope"]
    assert result["overlap"] == {"pictures": 9, "overlapping": 2, "same_bytes": 1}
    assert "2 of 9 pictures are in the training data" in summary_line("pope", result)
    file.write_text(json.dumps({"benchmarks": {"pope": found | {"data_sha256": "0"}}}))
    with pytest.raises(UserError, match="run over other files of pope"):
        evaluate(checked)
