"""Defines and checks the options of the eval command; no heavy imports, so that --help is quick."""

from dataclasses import dataclass
from typing import Any, Literal

from oq2vl_jax.bounds import Count, SmallCount, check_bounds
from oq2vl_jax.config import PromptForm, Template, Weights
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.eval.benchmarks import TASKS
from oq2vl_jax.paths import check_local, join, read_json


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a checkpoint on benchmarks."""

    checkpoint: str
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    tasks: str
    """Names of benchmarks, separated by commas: the modules of eval/benchmarks. A wrong name lists them."""
    data: str
    """Folder that holds the benchmarks' files at any depth: Hugging Face parquet or VLMEvalKit TSV."""
    out: str
    """Folder for the results."""
    profile: Literal["official", "open_qwen2vl"] = "official"
    """official: the rules of leaderboards. open_qwen2vl: the laxer rules of the published harness."""
    method: Literal["generate", "options"] = "generate"
    """generate: find the answer in a generated reply. options: take the likeliest option."""
    template: Template | None = None
    """Template of the questions; default: that of the training data. Raw prompts (profile open_qwen2vl) are plain."""
    prompt_form: PromptForm = "training"
    """published: questions as the paper's code writes them; only for template open_qwen2vl. It does not change the raw
    prompts of profile open_qwen2vl."""
    weights: Weights = "model"
    """ema: the averaged weights of a run with --ema.decay."""
    projector: str | None = None
    """FILE.py:NAME, the projector of your own that the checkpoint was trained with."""
    batch_size: SmallCount = 32
    limit: Count | None = None
    """Number of items to evaluate per task, evenly spaced; default: all. Recorded in the results."""
    overlap: str | None = None
    """Folder of oq2vl_jax.curate.overlap over the training data: the results say what it found, else that it was not
    checked."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Default: float32 on CPUs, bfloat16 elsewhere."""

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def check(config: EvalConfig) -> None:
    """Raises UserError for a wrong option, before anything is loaded."""
    check_bounds(config, as_flags=True)
    if not config.task_names:
        raise UserError("--tasks is empty.")
    for name in config.task_names:
        if name not in TASKS:
            raise UserError(f"--tasks: no benchmark {name!r}; there are {', '.join(TASKS)}{hint(name, TASKS)}.")
    if len(set(config.task_names)) < len(config.task_names):
        raise UserError("--tasks names a benchmark twice.")
    if not config.out.strip():
        raise UserError("--out is empty; give a folder.")
    check_local("--out", config.out)
    if config.overlap is not None:
        read_overlap(config.overlap)


def read_overlap(folder: str) -> dict[str, Any]:
    """Returns the report of curate.overlap in a folder. Raises UserError."""
    report = read_json(join(folder, "report.json"))
    if not isinstance(report, dict) or not isinstance(report.get("benchmarks"), dict):
        raise UserError(f"--overlap {folder}: report.json is not of oq2vl_jax.curate.overlap.")
    return report
