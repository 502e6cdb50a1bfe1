"""Jinja chat templates that write a conversation token for token as data/text.py does.

Content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} with the images first, as this
project's data has them. The newline behind an image in the first turn is missing from open_qwen2vl on purpose: the
published code drops that token (see data/text.py). The loop over message.content is written out in each, not in a
macro: vLLM looks for it to tell whether a template takes images. One difference is left: text that spells a special
token, such as <|im_end|>, stays text in data/text.py and becomes the token in a Hugging Face tokenizer.
"""


def content(behind_image: str) -> str:
    """Writes message.content; `behind_image` is an expression for what follows a picture."""
    return (
        "{%- if message.content is string -%}{{- message.content | trim -}}{%- else -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{- '<|image_pad|>' + BEHIND -}}"
        "{%- elif part.type == 'text' -%}{{- part.text | trim -}}"
        "{%- else -%}{{- raise_exception('only text and images: ' + part.type) -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    ).replace("BEHIND", behind_image)


NEWLINE = "'\\n'"

SYSTEM = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
)
WRITE_SYSTEM = "{{- '<|im_start|>system\\n' -}}" + content("''") + "{{- '<|im_end|>\\n' -}}"

PLAIN = (
    "{{- '<s>' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- raise_exception('this model was not trained with a system message') -}}"
    "{%- endif -%}" + content(NEWLINE) + "{%- if message.role == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
)

OPEN_QWEN2VL = (
    "{{- '<s>' -}}" + SYSTEM + "{%- set turns = namespace(human=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}" + WRITE_SYSTEM + "{%- elif message.role == 'user' -%}"
    "{%- set turns.human = turns.human + 1 -%}"
    "{{- '<|im_start|>user\\n' -}}"
    + content("('' if turns.human == 1 else '\\n')")
    + "{{- '<|im_end|>assistant\\n' -}}"
    "{%- else -%}"
    "{%- if not message.content -%}{{- ' ' -}}{%- endif -%}" + content("''") + "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

IMAGES_FIRST = (
    "{%- if message.content is not string -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- BEHIND -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
RELEASED = (
    "{%- set turns = namespace(human=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- set turns.human = turns.human + 1 -%}"
    "{%- if turns.human == 1 -%}"
    + IMAGES_FIRST.replace("BEHIND", "'<|image_pad|>\\n'")
    + "{{- '<s><|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else "
    "'You are a helpful assistant.') + '<|im_end|>\\n<|im_start|>user\\n' -}}"
    + IMAGES_FIRST.replace("BEHIND", NEWLINE)
    + "{%- if message.content is string -%}{{- message.content | trim -}}{%- else -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}"
    "{%- else -%}"
    "{{- '<|im_start|>user\\n' -}}" + content(NEWLINE) + "{%- endif -%}"
    "{{- '<|im_end|>assistant' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- if not message.content -%}{{- ' ' -}}{%- endif -%}" + content("''") + "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

CHATML = (
    SYSTEM + "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}" + content(NEWLINE) + "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

CHAT_TEMPLATES = {"plain": PLAIN, "open_qwen2vl": OPEN_QWEN2VL, "open_qwen2vl_released": RELEASED, "chatml": CHATML}
