"""Makes the README.md of an exported model: architecture, example of use, training configuration."""

from oq2vl_jax.config import CheckpointDescription, TrainConfig
from oq2vl_jax.config_files import to_json

ASK = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."
processor = AutoProcessor.from_pretrained(folder{remote})
model = AutoModelForImageTextToText.from_pretrained(folder{remote}).eval()
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("cat.png")], text=prompt, return_tensors="pt").to(model.device, model.dtype)
reply = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(reply[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def model_card(description: CheckpointDescription, training: TrainConfig | None, is_native: bool) -> str:
    """Returns Markdown with the hub's front matter."""
    model = description.model
    remote = "" if is_native else ", trust_remote_code=True"
    classes = (
        "transformers' own `LlavaForConditionalGeneration`; no remote code."
        if is_native
        else "`modeling_open_qwen2vl.py`, beside this file: transformers' Llava parts with an average pool in between; "
        "needs transformers 5.8 or newer and `trust_remote_code=True`."
    )
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [oq2vl_jax, open-qwen2vl]\n---\n",
        "# An Open-Qwen2VL model\n",
        f"SigLIP ({model.vision.image_size} px, patch {model.vision.patch_size}, features of the second-to-last "
        f"block) -> {model.num_visual_tokens} visual tokens an image -> {model.decoder.kind.capitalize()} "
        f"({model.decoder.num_layers} layers, width {model.decoder.hidden_size}); "
        "[arXiv 2504.00595](https://arxiv.org/abs/2504.00595). Exported by oq2vl_jax.\n",
        f"- Loaded as {classes}",
        f"- Prompt template: `{description.template}` (chat_template.jinja), images before the text of a message.",
        f"- Origin of the weights: {description.origin}.",
        "- The last block and the final norm of the vision tower are zeros: nothing computed depends on them.\n",
        ASK.format(remote=remote),
    ]
    if training is not None:
        lines.append(f"Trained with this configuration of oq2vl_jax:\n\n```json\n{to_json(training)}```\n")
    return "\n".join(lines)
