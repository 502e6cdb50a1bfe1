"""Writes the page of a report, report.md: a section per part, predictions beside measurements, the largest gaps."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from oq2vl_jax.bench.parts import plans, steps
from oq2vl_jax.paths import write_text

Figures = dict[str, Any]
NUM_GAPS = 5


def write_page(folder: Path, record: dict[str, Any]) -> None:
    write_text(str(folder / "report.md"), page(record))


def page(record: dict[str, Any]) -> str:
    """Returns the page as Markdown; the report may be unfinished."""
    results = {name: item["figures"] for name, item in record["items"].items() if item["status"] == "done"}
    sections: list[tuple[str, Callable[[dict[str, Figures]], Iterable[str]]]] = [
        ("a. The device", device_section), ("b. Exactness", exactness_section), ("c. The step", step_section),
        ("d. PyTorch on the same rows and weights", peers_section), ("e. Tuning and decoding", other_section),
        ("f. A profile of the step", profile_section), ("g. A loss curve", learning_section),
        ("h. One GPU by plan", plan_section),
    ]  # fmt: skip
    lines = [*head(record)]
    for title, section in sections:
        body = list(section(results))
        if body:
            lines += ["", f"## {title}", "", *body]
    lines += ["", "## Predicted and measured", "", *prediction_section(results)]
    return "\n".join([*lines, "", "## Every part", "", *parts_section(record), ""])


def head(record: dict[str, Any]) -> Iterable[str]:
    probe, identity = record["probe"], record["identity"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in probe["versions"].items())
    unfinished = [name for name, item in record["items"].items() if item["status"] in ("failed", "not reached")]
    yield f"# oq2vl_jax on one {probe['kind']}, {record['date']}"
    yield ""
    yield f"`python -m oq2vl_jax.bench report` of commit {record['commit']} (source {identity['source']}),"
    yield f"{identity['config']}; {versions}."
    if probe["driver"]:
        yield "Driver and limits: " + ", ".join(f"{key} {value}" for key, value in probe["driver"].items()) + "."
    yield f"Host: {probe['host']}."
    if unfinished:
        yield ""
        yield f"**Not there yet: {', '.join(unfinished)}** (the last table says why)."


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns rows as a Markdown table; a missing value shows as "-"."""
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")


def device_section(results: dict[str, Figures]) -> Iterable[str]:
    if figures := results.get("device"):
        side = figures["product_side"]
        rows = [{"measured": f"{name} product {side}^3", "rate": f"{rate:,.2f} TFLOP/s"}
                for name, rate in figures["product_tflops"].items()]  # fmt: skip
        rows.append({"measured": "copy, bytes read and written", "rate": f"{figures['copy_gb_per_second']:,.0f} GB/s"})
        yield from table(rows)
        if not figures["is_in_the_table"]:
            yield ""
            yield "Not in oq2vl_jax/devices.py: the rooflines below use these rates, and there is no MFU."


def exactness_section(results: dict[str, Figures]) -> Iterable[str]:
    if figures := results.get("exactness"):
        yield "Largest error over the largest value, against float32 with exact products; xla is the reference's own"
        yield "rounding in that type."
        yield ""
        yield from table(figures["attention"])
        yield ""
    if figures := results.get("exactness_step"):
        yield f"Loss and gradients of the fast step, two layers at full width, {figures['vocabulary']:,} entries in the"
        yield "vocabulary, against the plain path in float32:"
        yield ""
        yield from table(figures["step"])


STEP_COLUMNS = {
    "rows_per_microbatch": "rows", "remat": "remat", "attention": "attention", "gate_up": "gate, up",
    "layers": "layers", "tiles": "tiles", "tokens_per_second": "tokens/s", "scaled_tokens_per_second": "scaled",
    "mfu": "MFU", "step_seconds": "s a step", "roofline_seconds": "by roofline", "peak_memory_gib": "peak GiB",
    "planned_memory_gib": "planned GiB", "compile_seconds": "compile s",
}  # fmt: skip


def step_section(results: dict[str, Figures]) -> Iterable[str]:
    if base := results.get("step"):
        names = ["step", *(f"step_{name}" for name in steps.VARIANTS)]
        rows = [step_row(name, results[name]) for name in names if name in results]
        yield (
            f"{base['num_layers']} of {base['of_layers']} decoder layers, {base['rows_per_step']} rows a step of "
            f"{cell(base['fill'])} fill, {base['device']}. Changes one at a time, times against the first row."
        )
        yield ""
        yield from table(rows)
        if base["num_layers"] < base["of_layers"]:
            why = "the whole model does not fit here" if base["tried"] else "on a CPU for time's sake"
            yield ""
            yield f"Fewer layers: {why}; `scaled` is tokens/s by the FLOPs of all of them."
        for form in base["tried"]:
            yield ""
            yield f"Does not fit: {form}."


def step_row(name: str, figures: Figures) -> dict[str, Any]:
    row: dict[str, Any] = {"change": name.removeprefix("step_") if name != "step" else "none"}
    if "does_not_fit_gib" in figures:
        row["change"] += f" (does not fit: {cell(figures['does_not_fit_gib'])} GiB)"
    row["times"] = figures.get("times_as_fast", 1.0 if name == "step" else None)
    return row | {title: figures.get(key) for key, title in STEP_COLUMNS.items()}


def peers_section(results: dict[str, Figures]) -> Iterable[str]:
    if figures := results.get("peers"):
        ratios = figures["times_as_fast"]
        yield from table([
            {"form": side, "s a step": seconds, "ours is times as fast": ratios.get(side),
             "first loss": figures["first_loss"][side], "by our model": figures["expected_loss"].get(side)}
            for side, seconds in figures["median_seconds"].items()
        ])  # fmt: skip
        for side, why in figures["failed"].items():
            yield ""
            yield f"{side} {why}."


def other_section(results: dict[str, Figures]) -> Iterable[str]:
    rows = [step_row(name, results[name]) | {"change": name} for name in ("sft", "full_pretrain") if name in results]
    if rows:
        yield from table([{"configuration": row.pop("change")} | row for row in rows])
        yield ""
    ours, theirs = results.get("decoding"), results.get("decoding_transformers")
    if ours:
        yield (
            f"Decoding in bfloat16, prompts of {ours['prompt_tokens']} tokens, {ours['new_tokens']} new ones, "
            f"{ours['decoder_layers']} layers:"
        )
        yield ""
        peers = {row["batch"]: row for row in theirs["results"]} if theirs else {}
        yield from table([
            {"batch": row["batch"], "prefill ms": 1e3 * row["prefill_seconds"], "tokens/s": row["tokens_per_second"]}
            | ({"transformers: prefill ms": 1e3 * peers[row["batch"]]["prefill_seconds"],
                "tokens/s there": peers[row["batch"]]["tokens_per_second"],
                "ratio": row["tokens_per_second"] / peers[row["batch"]]["tokens_per_second"]}
               if row["batch"] in peers else {})
            for row in ours["results"]
        ])  # fmt: skip


def profile_section(results: dict[str, Figures]) -> Iterable[str]:
    if figures := results.get("profile"):
        yield f"{figures['num_steps']} steps; the device waits {100 * figures['idle_share']:.1f} % of the time."
        yield ""
        yield from table(figures["kernels"])


def learning_section(results: dict[str, Figures]) -> Iterable[str]:
    if figures := results.get("learning"):
        yield f"{figures['num_steps']} steps on pictures made here; last is the mean of ten. Colour and shape guessed:"
        yield f"{cell(figures['chance'])} nats."
        yield ""
        yield from table([{"type": dtype, "first loss": figures["first"][dtype], "last": figures["last"][dtype]}
                          for dtype in figures["losses"]])  # fmt: skip


def plan_section(results: dict[str, Figures]) -> Iterable[str]:
    measured = results.get("step")
    rows = [row for name in plans.DEVICES if (plan := results.get(f"plan_{name}")) for row in plan_rows(plan, measured)]
    yield from table(rows)


def plan_rows(plan: Figures, measured: Figures | None) -> Iterable[dict[str, Any]]:
    for form in plan["tried"]:
        is_this = measured is not None and plan["device"] == measured.get("device_name") and (
            (form["rows_per_microbatch"], form["remat"]) == (measured["rows_per_microbatch"], measured["remat"])
        )  # fmt: skip
        yield {
            "GPU": plan["device"], "rows": form["rows_per_microbatch"], "remat": form["remat"],
            "peak GiB": form["peak_gib"], "of": plan["usable_gib"], "fits": form["fits"],
            "tokens/s by roofline": form["roofline_tokens_per_second_per_gpu"],
            "measured here": measured["tokens_per_second"] if is_this and measured else None,
        }  # fmt: skip


def prediction_section(results: dict[str, Figures]) -> Iterable[str]:
    rows = [row for figures in results.values() for row in figures.get("predictions", ())]
    if not rows:
        yield "Nothing yet."
        return
    yield "Ratio: how many times as slow, or as large, as predicted. Of a device that is not in the table the measured"
    yield "rates of part a predict."
    yield ""
    yield from table(rows)
    yield ""
    yield f"The {NUM_GAPS} largest gaps: " + "; ".join(
        f"{row['what']} {cell(row['ratio'])}" for row in sorted(rows, key=lambda row: -row["ratio"])[:NUM_GAPS]
    ) + "."  # fmt: skip


def parts_section(record: dict[str, Any]) -> Iterable[str]:
    yield from table([
        {"part": item["group"], "name": name, "status": item["status"], "seconds": item["seconds"], "why": item["why"]}
        for name, item in record["items"].items()
    ])  # fmt: skip
