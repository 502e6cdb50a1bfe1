"""Options of python -m oq2vl_jax.generate and their checks."""

from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.bounds import CountOrZero, Length, Seed, SmallCount, Temperature, TopP, check_bounds
from oq2vl_jax.config import PromptForm, Template, Weights
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import check_local, is_file


@dataclass(frozen=True)
class GenerateConfig:
    """Asks a checkpoint about images. Greedy by default: the most likely token each time."""

    checkpoint: str
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    image: tuple[str, ...] = ()
    """Images of the question, in order."""
    prompt: str | None = None
    """The question; the images are put before it."""
    requests: str | None = None
    """jsonl file of requests, instead of --image and --prompt."""
    out: str | None = None
    """jsonl file for the predictions of --requests."""
    template: Template | None = None
    """Template of the prompts; default: the template of the checkpoint."""
    prompt_form: PromptForm = "training"
    """training: prompts as in the training data; published: as the paper's code writes them (only open_qwen2vl)."""
    weights: Weights = "model"
    """ema: the averaged weights of a run with --ema.decay."""
    projector: str | None = None
    """FILE.py:NAME, the projector of your own that the checkpoint was trained with."""
    max_new_tokens: Length = 64
    temperature: Temperature = 0.0
    """0: the most likely token; above 0: sample each token, with flatter probabilities at higher values."""
    top_p: TopP = 1.0
    """Sample from the fewest most likely tokens that together have at least this probability."""
    top_k: CountOrZero = 0
    """Sample from this many most likely tokens; 0: from all."""
    seed: Seed = 0
    """The same request with the same seed gets the same reply."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply and are removed from it."""
    batch_size: SmallCount = 64


def check(config: GenerateConfig) -> None:
    check_bounds(config, as_flags=True)
    if (config.requests is None) == (config.prompt is None):
        raise UserError("give either --prompt (with --image) or --requests.")
    if config.requests is not None and config.out is None:
        raise UserError("--requests needs --out, the file to write the predictions to.")
    if config.requests is not None and config.image:
        raise UserError("--image goes with --prompt; the images of --requests stand in the file.")
    if config.prompt is not None and config.out is not None:
        raise UserError("--out goes with --requests; a single reply is printed.")
    check_local("--out", config.out)
    if config.out is not None and not Path(config.out).absolute().parent.is_dir():
        raise UserError(f"--out {config.out}: its folder does not exist.")
    if config.out is not None and Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a folder; give a file.")
    for name, text in (("--prompt", config.prompt), *(("--stop", text) for text in config.stop)):
        if text is not None and not is_utf8(text):
            raise UserError(f"{name} is no UTF-8; is the terminal or script set to another encoding?")
    missing = [image for image in config.image if not is_file(image)]
    if missing:
        raise UserError(f"--image {missing[0]}: no such file.")


def is_utf8(text: str) -> bool:
    """Returns False for an argument with bytes that are not UTF-8, which Python holds as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
