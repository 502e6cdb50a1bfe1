"""Jinja chat templates that give the same tokens for a conversation as data/text/codec.py, with three exceptions.

Content is a string or a list of {"type": "image"} and {"type": "text", "text": ...}. As in serve/body.py, a line break
follows every image, consecutive messages of one role form one turn, blanks around a turn are removed, and <image> in a
text stays text. The loop over message.content is not a macro, because vLLM searches for that loop to detect whether a
template takes images.

The exceptions: Text that spells a special token, such as <|im_end|>, stays text in codec.py but becomes the token in a
Hugging Face tokenizer. open_qwen2vl drops the token after an image of the first turn, as the published code does, but a
template can only drop characters: how many depends on the tokenizer (FIRST below) and is known for up to MAX_BLANKS
blanks or MAX_LINE_BREAKS line breaks. open_qwen2vl_released puts nothing between "assistant" and an answer, so Hugging
Face's tokenizer joins that word with an answer that begins with a letter.
"""

import itertools
import json

from oq2vl_jax.data.text.codec import TextCodec
from oq2vl_jax.data.text.templates import DEFAULT_SYSTEM

MAX_BLANKS = 5
MAX_LINE_BREAKS = 32

TURNS = (
    "{%- set ns = namespace(system='', turns=[], role='', text='', run='') -%}"
    "{%- for message in messages -%}"
    "{%- set ns.text = '' -%}{%- set ns.run = '' -%}"
    "{%- if message.content is string -%}{%- set ns.run = message.content -%}"
    "{%- elif message.content -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{%- set ns.run = ns.run + part.text -%}"
    "{%- elif part.type in ('image', 'image_url') and message.role == 'user' -%}"
    "{%- set ns.text = ns.text + ns.run | replace('<image>', '<image-placeholder>') + '<|image_pad|>\\n' -%}"
    "{%- set ns.run = '' -%}"
    "{%- else -%}{{- raise_exception('only text, and images of the user, are taken: ' + part.type) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set ns.text = ns.text + ns.run | replace('<image>', '<image-placeholder>') -%}"
    "{%- if message.role in ('system', 'developer') -%}"
    "{%- if not loop.first -%}{{- raise_exception('a system message comes first') -}}{%- endif -%}"
    "{%- set ns.system = ns.text -%}"
    "{%- elif message.role == ns.role -%}"
    "{%- set ns.turns = ns.turns[:-1] + [ns.turns[-1] + '\\n' + ns.text] -%}"
    "{%- elif message.role == 'user' or (message.role == 'assistant' and ns.turns) -%}"
    "{%- set ns.role = message.role -%}{%- set ns.turns = ns.turns + [ns.text] -%}"
    "{%- else -%}{{- raise_exception('the user speaks first, and then user and assistant in turns') -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""Sets ns.system and ns.turns: texts with <|image_pad|> for each image, beginning with the user's."""
SYSTEM = "'<|im_start|>system\\n' + (ns.system or DEFAULT) + '<|im_end|>\\n'".replace("DEFAULT", repr(DEFAULT_SYSTEM))

PLAIN = (
    TURNS + "{{- '<s>' + ns.system -}}{%- for turn in ns.turns -%}{{- turn | trim -}}{%- endfor -%}"
)  # fmt: skip

CHATML = (
    TURNS + "{{- " + SYSTEM + " -}}"
    "{%- for turn in ns.turns -%}"
    "{{- '<|im_start|>' + ('assistant' if loop.index0 % 2 else 'user') + '\\n' + turn | trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and ns.turns | length % 2 -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

ANSWER = "{{- (turn | trim or ' ') + '<|im_end|>\\n' -}}"

OPEN_QWEN2VL = (
    TURNS + "{%- set first = FIRST -%}"
    "{%- for turn in ns.turns -%}"
    "{%- if loop.index0 % 2 -%}" + ANSWER + "{%- elif not loop.first -%}"
    "{{- '<|im_start|>user\\n' + turn | trim + '<|im_end|>assistant\\n' -}}"
    "{%- else -%}"
    "{{- '<s>' + " + SYSTEM + " + '<|im_start|>user\\n' -}}"
    "{%- for piece in (turn | trim).split('<|image_pad|>') -%}"
    "{%- if loop.first -%}{{- piece -}}"
    "{%- else -%}"
    "{%- set blanks = piece[: piece | length - piece.lstrip() | length] -%}"
    "{%- set broken = blanks[: blanks.rfind('\\n') + 1] -%}"
    "{{- '<|image_pad|>' + piece[first.get(broken, 1) :] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if not (turn | trim).endswith('<|image_pad|>') -%}{{- '<|im_end|>' -}}{%- endif -%}{{- 'assistant\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

RELEASED = (
    TURNS + "{%- for turn in ns.turns -%}"
    "{%- if loop.index0 % 2 -%}" + ANSWER + "{%- elif not loop.first -%}"
    "{{- '<|im_start|>user\\n' + turn | trim + '<|im_end|>assistant' -}}"
    "{%- else -%}"
    "{{- '<|image_pad|>\\n' * (turn.split('<|image_pad|>') | length - 1) + '<s>' + " + SYSTEM + " -}}"
    "{{- '<|im_start|>user\\n' + (turn | trim).replace('<|image_pad|>', '') + '<|im_end|>assistant' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

TEMPLATES = {"plain": PLAIN, "open_qwen2vl": OPEN_QWEN2VL, "open_qwen2vl_released": RELEASED, "chatml": CHATML}


def chat_template(name: str, codec: TextCodec) -> str:
    return TEMPLATES[name].replace("FIRST", json.dumps(first_tokens(codec)))


def first_tokens(codec: TextCodec) -> dict[str, int]:
    """Maps each run of blanks to the number of characters in its first token, if that is more than one.

    Qwen's tokenizers split text after the last line break of a run of blanks, so later text does not change this token.
    """
    inner = ["".join(blanks) for n in range(MAX_BLANKS - 1) for blanks in itertools.product("\n \t\r", repeat=n)]
    runs = ["\n", *(f"\n{blanks}\n" for blanks in inner), *("\n" * n for n in range(MAX_BLANKS, MAX_LINE_BREAKS + 1))]
    lengths = {run: len(codec.decode_exact(codec.encode(run)[:1])) for run in runs}
    return {run: length for run, length in lengths.items() if length > 1}
