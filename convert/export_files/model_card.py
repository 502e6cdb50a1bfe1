"""Makes the README.md of an exported model: architecture, how to ask it, where it comes from, how good it is."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.checkpoint import find_checkpoint, identity_of, load_description, load_train_config
from oq2vl_jax.config import CheckpointDescription, TrainConfig
from oq2vl_jax.config_files import to_json
from oq2vl_jax.errors import UserError
from oq2vl_jax.paths import read_json
from oq2vl_jax.weights import find_base

ASK = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
processor = AutoProcessor.from_pretrained(folder{remote})
model = AutoModelForImageTextToText.from_pretrained(folder{remote}).eval()
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("cat.png")], text=prompt, return_tensors="pt").to(model.device, model.dtype)
reply = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


ASK_OTHERS = """\
In vLLM, and with this project:

```bash
vllm serve {name}{remote_flag}
python -m oq2vl_jax.generate --checkpoint {name} --image cat.png --prompt "What is in the picture?"
```
"""
LICENCES = {
    r"qwen2\.5-(3b|72b)": "Qwen research licence (not for commercial use)",
    r"qwen(2\.5|3)": "Apache 2.0",
    r"siglip": "Apache 2.0",
}
"""Part of a name, in small letters: the licence that its publisher states. The first that fits counts."""


class Facts(NamedTuple):
    """name: of the repository, or "."; origins: of the weights, the newest first; totals: of the run that trained them;
    results: results.json of oq2vl_jax.eval."""

    name: str = "."
    origins: tuple[str, ...] = ()
    totals: dict[str, float] | None = None
    results: dict[str, Any] | None = None


def read_facts(checkpoint: Path, results: str | None, name: str | None) -> Facts:
    """Reads what a card says beside the model. Raises UserError for a folder without results.json."""
    found, own = None, identity_of(checkpoint)
    if results is not None:
        file = Path(results) / "results.json"
        if not file.is_file():
            raise UserError(f"--results {results}: no results.json; it is the folder given to oq2vl_jax.eval --out.")
        found = read_json(str(file))
        if not isinstance(found, dict):
            raise UserError(f"{file}: expected a JSON object.")
        others = {task for task, one in found.items() if one.get("checkpoint_identity", own) != own}
        if others:
            raise UserError(f"--results {results}: {', '.join(sorted(others))} is of another checkpoint than this one.")
    loader = checkpoint / "loader" / "metadata"
    totals = json.loads(loader.read_text()).get("totals") if loader.is_file() else None
    return Facts(name or ".", origins_of(checkpoint), totals, found)


def origins_of(checkpoint: Path) -> tuple[str, ...]:
    """Returns where the weights come from: the run, what it started from, and so on, as far as that is still there."""
    origins: list[str] = []
    seen: set[Path] = set()
    while checkpoint not in seen:
        seen.add(checkpoint)
        config = load_train_config(checkpoint)
        if config is None:
            return (*origins, load_description(checkpoint).origin)
        data = ", ".join(Path(source).name for source in config.data.sources) or config.data.kind
        adapters = f" (adapters of rank {config.lora.rank})" if config.lora.rank is not None else ""
        origins.append(f"{int(checkpoint.name):,} steps of {config.global_batch_size} rows on {data}{adapters}")
        if config.init_from is None:
            return (*origins, "random weights")
        try:
            checkpoint = find_base(checkpoint) if adapters else find_checkpoint(config.init_from)
        except UserError:
            return (*origins, f"{Path(config.init_from).name}, which is not here any more")
    return tuple(origins)


def model_card(description: CheckpointDescription, training: TrainConfig | None, is_native: bool, facts: Facts) -> str:
    """Returns Markdown with the hub's front matter."""
    model = description.model
    remote, remote_flag = ("", "") if is_native else (", trust_remote_code=True", " --trust-remote-code")
    classes = (
        "transformers' own `LlavaForConditionalGeneration`; no remote code."
        if is_native
        else "`modeling_open_qwen2vl.py`, beside this file: transformers' Llava parts with an average pool in between; "
        "needs transformers 5.8 or newer and `trust_remote_code=True`."
    )
    origins = facts.origins or (description.origin,)
    lines = [
        front_matter(origins),
        f"# {facts.name.rpartition('/')[2] if facts.name != '.' else 'An Open-Qwen2VL model'}\n",
        f"SigLIP ({model.vision.image_size} px, patch {model.vision.patch_size}, features of the second-to-last "
        f"block) -> {model.num_visual_tokens} visual tokens an image -> {model.decoder.kind.capitalize()} "
        f"({model.decoder.num_layers} layers, width {model.decoder.hidden_size}); "
        "[arXiv 2504.00595](https://arxiv.org/abs/2504.00595). Exported by oq2vl_jax.\n",
        f"- Loaded as {classes}",
        f"- Prompt template: `{description.template}` (chat_template.jinja), images before the text of a message.",
        f"- Origin of the weights, the newest first: {'; '.join(origins)}.",
        f"- Licences: {'; '.join(licences(origins)) or 'of the backbones and the data, see their own pages'}.",
        "- The last block and the final norm of the vision tower are zeros: nothing computed depends on them.\n",
        ASK.format(remote=remote, name=facts.name),
        ASK_OTHERS.format(remote_flag=remote_flag, name=facts.name),
    ]
    if facts.results:
        lines.append(evaluation_table(facts.results))
    if training is not None:
        lines += ["## Training\n", training_line(facts.totals), f"```json\n{to_json(training)}```\n"]
    return "\n".join(lines)


def front_matter(origins: tuple[str, ...]) -> str:
    names = re.findall(r"[\w.-]+/[\w.-]+", " ".join(origins[-1:]))
    bases = "".join(f"\n- {name}" for name in dict.fromkeys(names))
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [oq2vl_jax, open-qwen2vl]"
        + (f"\nbase_model:{bases}" if bases else "")
        + "\n---\n"
    )


def licences(origins: tuple[str, ...]) -> list[str]:
    """Returns the licences of the backbones that are named, and a line about the data."""
    found = []
    for name in re.findall(r"[\w./-]+", origins[-1]):
        licence = next((text for part, text in LICENCES.items() if re.search(part, name.lower())), None)
        if licence is not None:
            found.append(f"{name}: {licence}")
    return [*found, "of the training data: see its publishers"] if found else []


def evaluation_table(results: dict[str, Any]) -> str:
    rows = [
        f"| {task} | {100 * one['accuracy']:.1f} | {' to '.join(f'{100 * x:.1f}' for x in one['interval_95'])} "
        f"| {one['num_units']:,} | {one['method']} |"
        for task, one in results.items()
        if "accuracy" in one
    ]
    head = ["| benchmark | accuracy, % | 95 % interval | questions | method |", "|---|---|---|---|---|"]
    return "\n".join(["## Evaluation\n", *head, *rows, "\nIntervals are over questions; one training run.\n"])


def training_line(totals: dict[str, float] | None) -> str:
    if not totals or "tokens" not in totals:
        return "With this configuration of oq2vl_jax:\n"
    return (
        f"{totals['tokens']:,.0f} real tokens and {totals.get('images', 0):,.0f} images in "
        f"{totals['seconds'] / 3600:.1f} hours, with this configuration of oq2vl_jax:\n"
    )
