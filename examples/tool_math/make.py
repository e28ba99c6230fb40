"""Make what the example trains on: problems, worked conversations, and a tiny model.

    python examples/tool_math/make.py [--out runs/tool_math]

The conversations are those of a teacher who knows that there is a calculator, and mostly guesses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from sfpo_megatron.config.environments import ToolArgs
from sfpo_megatron.demo.tiny_model import TinyModel, train_tokenizer, write_model
from sfpo_megatron.tools.declared import choices_of, schemas_of

TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties \
| join(', ') }}){% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GUESSES = 0.65
"""Share of the conversations in which the teacher guesses."""
SIZES = {"worked": 6000, "train": 1500, "eval": 512}
MODEL = TinyModel(max_vocab=511)


def problems(seed: int) -> Iterator[tuple[int, int]]:
    """All products of two numbers of two digits, in any order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    Random(seed).shuffle(pairs)
    yield from pairs


def question(a: int, b: int) -> str:
    return f"What is {a} * {b}?"


def conversation(a: int, b: int) -> list[dict[str, str]]:
    """What the teacher does, the same in every process."""
    draw = Random(f"{a}*{b}")
    asked = {"role": "user", "content": question(a, b)}
    if draw.random() < GUESSES:
        guess = a * b + draw.choice([-1, 1]) * draw.randrange(1, 100)
        return [asked, {"role": "assistant", "content": f"Answer: {guess}"}]
    call = json.dumps({"name": "calculator", "arguments": {"expression": f"{a}*{b}"}})
    return [
        asked,
        {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
        {"role": "tool", "content": str(a * b)},
        {"role": "assistant", "content": f"Answer: {a * b}"},
    ]


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer_of(texts: list[str]) -> Any:
    """A tokenizer of the task's texts, with marks of turns and a chat template that has tools."""
    tokenizer = train_tokenizer(texts, MODEL.max_vocab)
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": marks[1]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tool_math"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    drawn = problems(0)
    sets = {name: [next(drawn) for _ in range(size)] for name, size in SIZES.items()}
    worked = [{"messages": conversation(a, b)} for a, b in sets.pop("worked")]
    write_jsonl(args.out / "data/worked.jsonl", worked)
    for name, pairs in sets.items():
        rows = ({"prompt": question(a, b), "answer": str(a * b)} for a, b in pairs)
        write_jsonl(args.out / f"data/{name}.jsonl", rows)
    texts = [message["content"] for row in worked for message in row["messages"]]
    written = "system user assistant tool Tools: calculator(expression)"
    tokenizer = tokenizer_of([*texts, *[written] * 9])
    tools = schemas_of(choices_of(ToolArgs()))
    messages = worked[0]["messages"]
    print(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    write_model(tokenizer, args.out / "model", MODEL, seed=args.seed, overwrite=True)


if __name__ == "__main__":
    main()
