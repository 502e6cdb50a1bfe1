"""What an evaluation is told, and what can be wrong with it; imports nothing that takes long."""

from dataclasses import dataclass
from typing import Literal

from oq2vl_jax.bounds import Count, SmallCount, check_bounds
from oq2vl_jax.config import PromptForm, Template
from oq2vl_jax.errors import UserError, hint
from oq2vl_jax.paths import check_local

TASKS = ("mmbench", "seedbench", "mmstar", "mathvista", "ai2d", "textvqa", "pope", "mmmu", "easy_vqa")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a checkpoint on benchmarks."""

    checkpoint: str
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    tasks: str
    """Names, separated by commas: mmbench, seedbench, mmstar, mathvista, ai2d, textvqa, pope, mmmu, easy_vqa."""
    data: str
    """Folder with the benchmarks' files anywhere below: Hugging Face parquet or VLMEvalKit TSV."""
    out: str
    """Folder for the results."""
    profile: Literal["official", "open_qwen2vl"] = "official"
    """official: the rules of leaderboards. open_qwen2vl: what the published harness computed, laxer."""
    method: Literal["generate", "options"] = "generate"
    """How an answer is found: in a generated reply, or as the likeliest of the options."""
    template: Template | None = None
    """How questions are written; default: as the checkpoint's data was. Raw prompts (open_qwen2vl) are always plain."""
    prompt_form: PromptForm = "training"
    """published: questions as the code of the paper asks them in template open_qwen2vl; of no effect on the raw prompts
    that its harness and profile open_qwen2vl use."""
    batch_size: SmallCount = 32
    limit: Count | None = None
    """Only so many items of each task, evenly spaced; named in the results."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Default: float32 on CPUs, bfloat16 elsewhere."""

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def check(config: EvalConfig) -> None:
    """Raises UserError for what can be wrong before anything is loaded."""
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
