"""Rows that a warm start learns from, and chat templates in the forms that models ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from made.configs import run_config

from sfpo_megatron.config.tree import DataSource, RunConfig

ENDS = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}MARK{% endgeneration %}REST"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
)
TEMPLATES = {
    "prefixes": CHATML,
    "prefixes, stripped": CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
    # Qwen3 writes an empty thought before an answer that has none.
    "prefixes, a thought": CHATML.replace(
        "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
    ),
    "marks with the end": MARKED.replace("MARK", "{{ m.content }}<|im_end|>").replace("REST", "\n"),
    "marks with the line": MARKED.replace("MARK", "{{ m.content }}<|im_end|>\n").replace(
        "REST", ""
    ),
    "marks of the text": MARKED.replace("MARK", "{{ m.content }}").replace("REST", "<|im_end|>\n"),
    "marks, trimmed": MARKED.replace("MARK", "{%- generation -%}").replace(
        "{% generation %}{%- generation -%}", "{%- generation -%}{{ m.content }}<|im_end|>"
    ).replace("REST", "\n"),
}  # fmt: skip


def config_of(folder: Path, rows: list[Any], **sections: Any) -> RunConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(source="jsonl", path=str(file), columns=sections.pop("columns", {}))
    data = {"train": (source,), **sections.pop("data", {})}
    return run_config(data=data, **sections)


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"1 + {i} =", "answer": str(1 + i)} for i in range(count)]
