"""Jinja chat templates that write a conversation token for token as data/text.py does.

Content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} with the images first, as this
project's data has them. The newline behind an image in the first turn is missing from open_qwen2vl on purpose: the
published code drops that token (see data/text.py).
"""

CONTENT = """\
{%- macro write(content, behind_image) -%}
{%- if content is string -%}{{ content | trim }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{{ '<|image_pad|>' + behind_image }}{%- else -%}{{ part.text | trim }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = 'You are a helpful assistant.' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = write(messages[0].content, '') -%}{%- set messages = messages[1:] -%}
{%- endif -%}
"""

PLAIN = """\
{{- '<s>' -}}
{%- for message in messages -%}
{{- write(message.content, '\\n') -}}
{%- if message.role == 'assistant' -%}{{ '<|im_end|>' }}{%- endif -%}
{%- endfor -%}
"""

OPEN_QWEN2VL = """\
{{- '<s><|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|im_start|>user\\n' + write(message.content, '' if loop.first else '\\n') + '<|im_end|>assistant\\n' -}}
{%- else -%}
{{- (write(message.content, '') or ' ') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

CHATML = """\
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + write(message.content, '\\n') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

CHAT_TEMPLATES = {"plain": CONTENT + PLAIN, "open_qwen2vl": CONTENT + OPEN_QWEN2VL, "chatml": CONTENT + CHATML}
