"""Evaluates a checkpoint: predicts the items in batches of a fixed plan and resumes exactly.

Batches are written whole and in the order of the plan. After an interruption no finished batch is repeated and the
remaining batches are unchanged, so replies and results.json are the same as without one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.data.samples.images import ImageError, check_image
from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.benchmark import Benchmark, Item, Judgement, Prompt, RowError, check_answers
from oq2vl_jax.eval.benchmarks import find_benchmark
from oq2vl_jax.eval.eval_config import EvalConfig, read_overlap
from oq2vl_jax.eval.report import task_results, write_mistakes, write_results
from oq2vl_jax.eval.tables import Table, find_files, read_table, sha256_of
from oq2vl_jax.generate.generator import Generator, Request
from oq2vl_jax.generate.reply import SamplingOptions
from oq2vl_jax.jsonl import read_whole_lines
from oq2vl_jax.paths import write_text

ROW_ERRORS = (ValueError, TypeError, KeyError, AttributeError)
"""Errors that a cell of an unexpected type can raise while a row is read."""

INDEX_COLUMNS = ("index", "id", "question_id", "pid")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Runs every task and writes OUT. Returns the results by task, as in results.json. Raises UserError."""
    tasks = {name: find_files(config.data, name, find_benchmark(name).files) for name in config.task_names}
    for name, files in tasks.items():  # checks files before the checkpoint is loaded; keeps pictures of one task only
        read_items(name, files)
    generator = Generator(
        config.checkpoint, config.template, config.dtype, config.prompt_form, config.weights, config.projector
    )
    results = {}
    for name, files in tasks.items():
        items = evenly_spaced(read_items(name, files), config.limit)
        benchmark, folder = find_benchmark(name), Path(config.out) / name
        settings = run_settings(config, generator, files)
        overlap = overlap_of(config.overlap, name, settings["data_sha256"])
        bad_rows = {item.index: item.problem for item in items if item.problem}
        unreadable = {item.index: why for item in items if not item.problem and (why := image_problem(item))}
        unusable = unreadable | bad_rows
        predictions, likelihoods = predict(benchmark, items, unusable, generator, config, settings, folder)
        judgements = [
            Judgement(0.0, None)
            if item.index in unusable
            else benchmark.judge(item, predictions[item.index], config.profile)
            for item in items
        ]
        results[name] = task_results(benchmark, items, judgements, settings, unreadable, bad_rows)
        results[name]["overlap"] = overlap
        if likelihoods and len(likelihoods) == len(items) - len(unusable):
            results[name]["log_probability"] = sum(likelihoods.values()) / len(likelihoods)
        write_predictions(folder, items, judgements, predictions, unusable, likelihoods)
        write_mistakes(folder / "mistakes.html", benchmark, items, judgements, predictions, results[name])
        print(summary_line(name, results[name]), flush=True)
    write_results(Path(config.out), results)
    return results


def overlap_of(folder: str | None, name: str, data_sha256: str) -> dict[str, Any] | None:
    """Returns how many pictures of a benchmark are in the training data, as curate.overlap found; None: not checked.

    Raises UserError if it was run over other files of the benchmark.
    """
    found = read_overlap(folder)["benchmarks"].get(name) if folder is not None else None
    if found is None:
        return None
    if found["data_sha256"] != data_sha256:
        raise UserError(f"--overlap {folder}: it was run over other files of {name}; run curate.overlap again.")
    return {key: found[key] for key in ("pictures", "overlapping", "same_bytes")}


def read_items(name: str, files: list[Path]) -> list[Item]:
    """Reads the items of a benchmark. A row with unexpected values becomes an item with a problem. Raises UserError if
    no row can be asked, and for missing columns."""
    table, read = read_table(name, files), find_benchmark(name).read
    try:
        items = read(table)
    except UserError:
        raise
    except ROW_ERRORS:
        items = check_answers([item for i, row in enumerate(table.rows, 1) for item in read_row(read, table, row, i)])
    if not items:
        raise UserError(f"{name}: {files[0]} has no questions of this benchmark.")
    if all(item.problem for item in items):
        raise UserError(f"{name}: no row of {files[0]} can be asked; row {items[0].index}: {items[0].problem}.")
    return items


def read_row(read: Callable[[Table], list[Item]], table: Table, row: dict[str, Any], number: int) -> list[Item]:
    numbered = row if set(row) & set(INDEX_COLUMNS) else row | {"index": number - 1}
    try:
        return read(table._replace(rows=[numbered]))
    except ROW_ERRORS as error:
        index = next((str(row[name]) for name in INDEX_COLUMNS if row.get(name)), f"row {number}")
        why = str(error) if isinstance(error, RowError) else "a cell holds a value of another kind than expected"
        return [Item(index, "", [], None, problem=why)]


def evenly_spaced(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def run_settings(config: EvalConfig, generator: Generator, files: list[Path]) -> dict[str, Any]:
    """Returns the settings that the predictions depend on; predict refuses an OUT with other settings."""
    return {
        "profile": config.profile,
        "method": config.method,
        "template": generator.template,
        "prompt_form": generator.prompt_form,
        "weights": generator.weights_name,
        "checkpoint": generator.checkpoint,
        "checkpoint_identity": generator.identity,
        "data_files": [file.name for file in files],
        "data_sha256": sha256_of(files),
        "limit": config.limit,
        "batch_size": config.batch_size,
        "dtype": generator.dtype,
        "model": dataclasses.asdict(generator.model_config),
    }


def image_problem(item: Item) -> str | None:
    """Returns why a picture of the item cannot be used, or None. Such an item counts as wrong and is listed."""
    if not item.images:
        return "no image"
    try:
        for image in item.images:
            check_image(image)
    except ImageError as problem:
        return str(problem)
    return None


def predict(
    benchmark: Benchmark,
    items: list[Item],
    unusable: dict[str, str],
    generator: Generator,
    config: EvalConfig,
    settings: dict[str, Any],
    folder: Path,
) -> tuple[dict[str, str], dict[str, float]]:
    """Returns {index: reply or likeliest option}, with those of earlier runs of the same command, and, by options,
    {index: log-probability of the right answer, in nats}. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings)
    file = folder / "replies.jsonl"
    lines = {line["index"]: line for line in read_whole_lines(file)}
    asked = [item for item in items if item.index not in unusable]
    batches = plan(benchmark, asked, generator, config)
    with file.open("a") as stream:
        for batch, prompts, requests in show_progress(batches, benchmark.name, len(asked)):
            if all(item.index in lines for item in batch):
                continue
            answers = ask(generator, prompts, requests, config)
            new = [answer_line(*parts) for parts in zip(batch, prompts, answers, strict=True)]
            stream.write("".join(json.dumps(line) + "\n" for line in new))
            stream.flush()
            os.fsync(stream.fileno())
            lines |= {line["index"]: line for line in new}
    replies = {index: line["reply"] for index, line in lines.items()} | dict.fromkeys(unusable, "")
    likelihoods = {index: line["log_probability"] for index, line in lines.items() if "log_probability" in line}
    return replies, likelihoods


class Answer(NamedTuple):
    """scores: log-probability of each option, in nats; None for a generated reply."""

    reply: str
    scores: list[float] | None = None


def answer_line(item: Item, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Returns the line of replies.jsonl, with the log-probability of the right answer where options were scored."""
    line: dict[str, Any] = {"index": item.index, "reply": answer.reply}
    options = [option.strip() for option in prompt.options]
    right = [text for text in (item.answer, item.choices.get(str(item.answer))) if text in options]
    if answer.scores is not None and right:
        line["log_probability"] = answer.scores[options.index(right[0])]
    return line


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "settings.json"
    if file.exists():
        saved = json.loads(file.read_text())
        changed = [key for key in settings if saved.get(key) != json.loads(json.dumps(settings[key]))]
        if changed:
            raise UserError(
                f"--out {folder.parent} holds an evaluation with another {', '.join(changed)}; choose another folder."
            )
        return
    write_text(str(file), json.dumps(settings, indent=2) + "\n")


def plan(
    benchmark: Benchmark, items: list[Item], generator: Generator, config: EvalConfig
) -> list[tuple[list[Item], list[Prompt], list[Request]]]:
    """Returns the batches, each with one kind of prompt. They depend only on items and settings. Raises UserError."""
    prompts = [benchmark.prompt(item, config.profile) for item in items]
    if config.method == "options" and any(not prompt.options for prompt in prompts):
        open_item = next(item for item, prompt in zip(items, prompts, strict=True) if not prompt.options)
        raise UserError(
            f"--method options: {benchmark.name} has questions without options (row {open_item.index}); use generate."
        )
    requests = [request_of(generator, prompt, item) for prompt, item in zip(prompts, items, strict=True)]
    kinds: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault((prompt.max_new_tokens, prompt.stop, prompt.is_raw), []).append(i)
    batches = []
    for numbers in kinds.values():
        for chosen in generator.batches([requests[i] for i in numbers], config.batch_size):
            of_batch = [numbers[i] for i in chosen]
            batches.append(tuple([source[i] for i in of_batch] for source in (items, prompts, requests)))
    return batches


def request_of(generator: Generator, prompt: Prompt, item: Item) -> Request:
    template = "plain" if prompt.is_raw else None
    images = item.images if prompt.images is None else list(prompt.images)
    return Request(generator.encode_turns([prompt.text], template=template), images)


def ask(generator: Generator, prompts: list[Prompt], requests: list[Request], config: EvalConfig) -> list[Answer]:
    """Returns the reply, or the likeliest option, for each request of one batch."""
    padded = requests + [requests[-1]] * (config.batch_size - len(requests))
    is_published_choice = prompts[0].is_raw and bool(prompts[0].options)  # AI2D in the published harness
    if config.method == "options" or is_published_choice:
        options = [prompt.options for prompt in prompts]
        options += [options[-1]] * (len(padded) - len(options))
        encoded = [[generator.codec.encode(option) for option in of_item] for of_item in options]
        scores = generator.score(padded, encoded)
        answers = [Answer(of_item[row.index(max(row))], row) for of_item, row in zip(options, scores, strict=True)]
        return answers[: len(requests)]
    sampling = SamplingOptions(prompts[0].max_new_tokens, stop=prompts[0].stop)
    return [Answer(reply.text.strip()) for reply in generator.generate(padded, sampling)][: len(requests)]


def write_predictions(
    folder: Path,
    items: list[Item],
    judgements: list[Judgement],
    predictions: dict[str, str],
    unusable: dict[str, str],
    likelihoods: dict[str, float],
) -> None:
    lines = []
    for item, judgement in zip(items, judgements, strict=True):
        record = {
            "index": item.index, "question": item.question, "choices": item.choices, "answer": item.answer,
            "reply": predictions[item.index], "parsed": judgement.parsed, "score": judgement.score,
            "pictures": hashlib.sha256(b"".join(item.images)).hexdigest()[:16],
        }  # fmt: skip
        if item.index in likelihoods:
            record["log_probability"] = likelihoods[item.index]
        if item.index in unusable:
            record["row_problem" if item.problem else "image_problem"] = unusable[item.index]
        lines.append(json.dumps(record) + "\n")
    write_text(str(folder / "predictions.jsonl"), "".join(lines))


def show_progress(batches: list, name: str, total: int) -> Iterator[tuple[list[Item], list[Prompt], list[Request]]]:
    """Yields the batches and shows progress on stderr: a bar on a terminal, else a line per tenth of the items."""
    import sys

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(batches, description=name, console=Console(stderr=True))
        return
    done = 0
    for batch in batches:
        yield batch
        before, done = done, done + len(batch[0])
        if done * 10 // total > before * 10 // total:
            print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)


def summary_line(name: str, result: dict[str, Any]) -> str:
    low, high = result["interval_95"]
    line = (
        f"{name} ({result['profile']}, {result['method']}): {100 * result['accuracy']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] of {result['num_units']:,}"
    )
    notes = [f"unparsed {100 * result['unparsed_rate']:.1f} %"] if result["unparsed_rate"] else []
    notes += [f"{len(result['bad_rows'])} rows that cannot be asked"] if result["bad_rows"] else []
    notes += [f"{len(result['unreadable_images'])} with unreadable images"] if result["unreadable_images"] else []
    notes += [f"limited to {result['num_items']:,} items"] if result["limit"] else []
    overlap = result.get("overlap")
    notes.append(
        f"{overlap['overlapping']:,} of {overlap['pictures']:,} pictures are in the training data"
        if overlap
        else "overlap with the training data not checked"
    )
    return line + "".join(f", {note}" for note in notes)
