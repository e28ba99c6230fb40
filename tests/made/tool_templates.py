"""Chat templates with tools, in the two ways of the field, and a tokenizer that has one."""

from __future__ import annotations

from typing import Any

from sfpo_megatron.demo.tiny_model import train_tokenizer

HERMES = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Results of one turn's calls stand together in a turn of the user."""

LLAMA = """\
{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|im_start|>' + role + '\\n\\n' + m.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""

FORGETFUL = """\
{%- for m in messages %}
{%- if m.role != 'assistant' or loop.index0 >= messages | length - 3 %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Leaves out what the assistant said earlier."""


def tool_tokenizer(template: str = HERMES, *, texts: tuple[str, ...] = ()) -> Any:
    """Byte-level, with `<|im_end|>` as the token that ends a generation."""
    words = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call> user'
    tokenizer = train_tokenizer([words, *texts] * 4, 511)
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer
