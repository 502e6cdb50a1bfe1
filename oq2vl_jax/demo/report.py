"""python -m oq2vl_jax.demo.report: writes easy-VQA accuracy, loss curves and a grid of answers as PNGs and HTML.

The last printed line is `easy-VQA test accuracy: NN.N % [low, high] (question-only: NN.N %; N seeds gave ..)`. The
interval is of the test questions, by picture. Other seeds, and machines that round otherwise, differ by more: what one
more run is expected to give follows from SEED_ACCURACIES, and the report says so if this one lies outside.
Question-only is the accuracy on the same test split if each question gets its most frequent training answer, without
looking at any picture.
"""

import base64
import html
import json
import random
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.bounds import Seed, parse
from oq2vl_jax.errors import UserError, run_command

INK, MUTED, GOOD, BAD, LINE = "#1d2733", "#68768a", "#1a7f4b", "#c0392b", "#2f6fb5"
GRID_ROWS, GRID_COLUMNS = 4, 6
NUM_WRONG_SHOWN = 6
SEED_ACCURACIES = {1: 99.3, 2: 99.7, 3: 99.6, 4: 99.6, 5: 99.5}
"""Seed of both stages: per cent, each on one core with AVX2, 27 November 2026."""
TITLE_CHARACTERS = 26


@dataclass(frozen=True)
class ReportConfig:
    """Report of the easy-VQA demo."""

    predictions: str
    """predictions.jsonl of python -m oq2vl_jax.eval --tasks easy_vqa."""
    by_options: str
    """predictions.jsonl of the same command with --method options."""
    pictures: str
    """Folder with the test pictures, IMAGE.png."""
    runs: tuple[str, ...]
    """Run directories, in the order they were trained."""
    out: str
    """Folder for report.html, loss.png and answers.png."""
    seed: Seed = 0
    """Seed for the choice of the predictions that are shown."""


@dataclass(frozen=True)
class Prediction:
    image: str
    question: str
    answer: str
    reply: str

    @property
    def is_right(self) -> bool:
        return self.reply.strip().lower() == self.answer

    @property
    def kind(self) -> str:
        if self.answer in ("yes", "no"):
            return "yes or no"
        return "shape" if self.answer in ("circle", "rectangle", "triangle") else "color"


def read_predictions(path: str, pictures: str) -> list[Prediction]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; python -m oq2vl_jax.eval --tasks easy_vqa writes it.")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [
        Prediction(str(Path(pictures) / f"{r['index'].split('-')[0]}.png"), r["question"], r["answer"], r["reply"])
        for r in rows
    ]


def accuracy(predictions: list[Prediction]) -> float:
    """Returns the percentage of replies that equal the answer."""
    return 100 * sum(prediction.is_right for prediction in predictions) / max(len(predictions), 1)


def interval_of_questions(predictions: list[Prediction]) -> tuple[float, float]:
    """Returns the 95 % interval of the accuracy in per cent; questions about one picture count together."""
    import numpy as np

    from oq2vl_jax.lab.statistics import crossed

    scores = np.array([[100.0 * prediction.is_right for prediction in predictions]])
    found = crossed(scores, np.zeros_like(scores), [prediction.image for prediction in predictions])
    return (found.low, found.high) if found.low is not None and found.high is not None else (0.0, 100.0)


def expected_of_a_run() -> tuple[float, float]:
    """Returns the interval that holds one more run in 95 % of all cases, given those of SEED_ACCURACIES."""
    import numpy as np
    from scipy import stats

    values = list(SEED_ACCURACIES.values())
    number, mean, spread = len(values), np.mean(values), np.std(values, ddof=1)
    half = stats.t.ppf(0.975, number - 1) * spread * (1 + 1 / number) ** 0.5
    return float(mean - half), min(100.0, float(mean + half))


def last_line(predictions: list[Prediction], question_only: float) -> str:
    low, high = interval_of_questions(predictions)
    return (
        f"easy-VQA test accuracy: {accuracy(predictions):.1f} % [{low:.1f}, {high:.1f}] "
        f"(question-only: {question_only:.1f} %; {len(SEED_ACCURACIES)} seeds gave "
        f"{min(SEED_ACCURACIES.values()):.1f} to {max(SEED_ACCURACIES.values()):.1f})"
    )


def surprise(predictions: list[Prediction]) -> str | None:
    """Returns what to say about an accuracy outside of what five seeds let expect; None for one inside."""
    low, high = expected_of_a_run()
    if low <= accuracy(predictions) <= high:
        return None
    return (
        f"this is outside of what {len(SEED_ACCURACIES)} seeds let expect of one more run, {low:.1f} to {high:.1f} %; "
        "please report it, with the machine"
    )


def question_only_accuracy(predictions: list[Prediction]) -> float:
    """Returns the percentage that is right if every question gets its most frequent answer in the training split."""
    import easy_vqa

    answers = defaultdict(Counter)
    for question, answer, _ in zip(*easy_vqa.get_train_questions(), strict=True):
        answers[question][answer] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    return 100 * sum(guesses.get(p.question) == p.answer for p in predictions) / max(len(predictions), 1)


def read_metrics(run: str) -> list[dict]:
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"--runs {run}: no metrics.jsonl there.")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if "loss" in record]


def draw_losses(runs: tuple[str, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 3.2), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        records = read_metrics(run)
        axis.plot([r["step"] for r in records], [r["loss"] for r in records], color=LINE, linewidth=1.6)
        axis.set_yscale("log")
        axis.set_title(Path(run).name, loc="left", color=INK, fontsize=11, fontweight="bold")
        axis.set_xlabel("optimizer step", color=MUTED)
        axis.set_ylabel("loss (nats per labelled token)", color=MUTED)
        axis.grid(True, color="#e6eaf0", linewidth=0.8)
        axis.tick_params(colors=MUTED, labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c5cdd8")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_answers(predictions: list[Prediction], path: Path) -> None:
    """Draws a grid of test pictures with question, answer and prediction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    layout = ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.06)
    figure, axes = plt.subplots(GRID_ROWS, GRID_COLUMNS, figsize=(2.25 * GRID_COLUMNS, 2.75 * GRID_ROWS), layout=layout)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, prediction in zip(axes.flat, predictions, strict=False):
        with Image.open(prediction.image) as image:
            axis.imshow(image.convert("RGB"))
        axis.set_title(textwrap.fill(prediction.question, TITLE_CHARACTERS), fontsize=8.5, color=INK)
        mark, color = ("✓", GOOD) if prediction.is_right else ("✗", BAD)
        text = f"{mark} {prediction.reply}" + ("" if prediction.is_right else f"   (answer: {prediction.answer})")
        axis.text(0.5, -0.11, text, transform=axis.transAxes, ha="center", color=color, fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose_shown(predictions: list[Prediction], seed: int) -> list[Prediction]:
    """Returns a random sample for the grid: up to NUM_WRONG_SHOWN wrong predictions, the rest right."""
    rng = random.Random(seed)
    wrong = [p for p in predictions if not p.is_right]
    right = [p for p in predictions if p.is_right]
    wrong = rng.sample(wrong, min(NUM_WRONG_SHOWN, len(wrong)))
    return rng.sample(right, min(GRID_ROWS * GRID_COLUMNS - len(wrong), len(right))) + wrong


def write_page(
    path: Path, figures: list[Path], predictions: list[Prediction], question_only: float, by_options: float
) -> None:
    rows = []
    for kind in ("shape", "color", "yes or no"):
        of_kind = [p for p in predictions if p.kind == kind]
        rows.append(f"<tr><td>{kind}</td><td>{len(of_kind):,}</td><td>{accuracy(of_kind):.1f} %</td></tr>")
    num_wrong = sum(not p.is_right for p in predictions)
    confusions = Counter((p.answer, p.reply) for p in predictions if not p.is_right).most_common(8)
    mistakes = "".join(
        f"<tr><td>{html.escape(answer)}</td><td>{html.escape(reply)}</td><td>{count}</td></tr>"
        for (answer, reply), count in confusions
    )
    images = [
        f'<img alt="{f.stem}" src="data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}">' for f in figures
    ]
    path.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>oq2vl_jax: easy-VQA demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1060px; margin: 40px auto; padding: 0 20px; }}
 h1 {{ font-size: 1.5rem; margin-bottom: 0; }} h2 {{ font-size: 1.1rem; margin-top: 2.2em; }}
 .lead {{ color: {MUTED}; margin-top: .3em; }}
 .score {{ font-size: 3rem; font-weight: 700; color: {GOOD}; line-height: 1.1; }}
 .row {{ display: flex; gap: 60px; flex-wrap: wrap; align-items: flex-start; margin-top: 1.5em; }}
 table {{ border-collapse: collapse; }} td, th {{ padding: 4px 18px 4px 0; text-align: left; }}
 th {{ color: {MUTED}; font-weight: 500; }} tr {{ border-bottom: 1px solid #e6eaf0; }}
 img {{ max-width: 100%; height: auto; }}
</style>
<h1>A small Open-Qwen2VL on easy-VQA</h1>
<p class="lead">Trained from scratch on this machine: captions first, then questions with more visual tokens.
Every answer below was generated greedily; a reply counts when it equals the answer.</p>
<div class="row">
 <div><div class="score">{accuracy(predictions):.1f} %</div>of {len(predictions):,} test questions<br>
 <span class="lead">by the likeliest of 13 options: {by_options:.1f} %<br>
 without looking at the picture: {question_only:.1f} %</span></div>
 <table><tr><th>asks for</th><th>questions</th><th>right</th></tr>{"".join(rows)}</table>
 <table><tr><th>answer</th><th>reply</th><th>times</th></tr>{mistakes or "<tr><td>no mistakes</td></tr>"}</table>
</div>
<h2>Loss</h2>{images[0]}
<h2>Answers on the test split, {min(NUM_WRONG_SHOWN, num_wrong)} of the {num_wrong} mistakes among them</h2>{images[1]}
<p class="lead">Data: easy-VQA by Victor Zhou (MIT).</p>
</html>
""")


def main() -> None:

    config = parse(ReportConfig, prog="python -m oq2vl_jax.demo.report")
    predictions = read_predictions(config.predictions, config.pictures)
    by_options = accuracy(read_predictions(config.by_options, config.pictures))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_losses(config.runs, out / "loss.png")
    draw_answers(choose_shown(predictions, config.seed), out / "answers.png")
    question_only = question_only_accuracy(predictions)
    write_page(out / "report.html", [out / "loss.png", out / "answers.png"], predictions, question_only, by_options)
    print(f"by the likeliest of 13 options instead of a generated reply: {by_options:.1f} %")
    print(f"report: {out / 'report.html'}, {out / 'loss.png'}, {out / 'answers.png'}")
    unexpected = surprise(predictions)
    if unexpected is not None:
        print(unexpected)
    print(last_line(predictions, question_only))


if __name__ == "__main__":
    run_command(main)
