"""Writes the page of an ablation for docs/ablations: its report with charts, its plan and its results."""

import json
import shutil
from pathlib import Path

from oq2vl_jax.lab import charts
from oq2vl_jax.lab.page import costs
from oq2vl_jax.lab.registration import PLAN
from oq2vl_jax.lab.report import as_markdown
from oq2vl_jax.lab.results import Results
from oq2vl_jax.paths import write_text


def publish(results: Results, file: str, out: str, folder: str) -> Path:
    """Writes FOLDER/NAME.md, its charts, NAME-plan.json and NAME-results.csv. Returns the page."""
    name, target = Path(file).stem, Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    drawn = [("difference", charts.forest(results))]
    drawn += [(stage, charts.curves(results, stage, "step")) for stage in results.plan.ablation.stages]
    pictures = []
    for part, svg in drawn:
        if svg is not None:
            write_text(str(target / f"{name}-{part}.svg"), svg)
            pictures.append(f"![{part}]({name}-{part}.svg)")
    head, _, rest = as_markdown(results, file, out).partition("\n## ")
    cost = ["## Cost", "", *(f"- {line}" for line in costs(results)), ""]
    data = f"Every number: [results]({name}-results.csv); [plan]({name}-plan.json), written before the first run."
    text = "\n".join(
        [head.rstrip(), "", pictures[0], "", *pictures[1:], "", f"## {rest.rstrip()}", "", *cost, data, ""]
    )
    write_text(str(target / f"{name}.md"), text)
    shutil.copyfile(Path(out) / "results.csv", target / f"{name}-results.csv")
    plan = json.loads((Path(out) / PLAN).read_text())
    write_text(str(target / f"{name}-plan.json"), json.dumps(plan) + "\n")
    return target / f"{name}.md"
