"""Make what the example trains on: games, a bad player's conversations, and a tiny model.

    python examples/game/make.py [--out runs/game]

The player halves what is left in one game of three; in the others he guesses anything that is
still possible.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from game import reply

from sfpo_megatron.demo.tiny_model import TinyModel, train_tokenizer, write_model

TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MOST, MAX_TURNS = 15, 4
"""Four guesses find any of 15 numbers, by one who halves what is left."""
HALVES = 1 / 3
"""Share of the games that are played so."""
SIZES = {"worked": 6000, "train": 1500, "eval": 512}
MODEL = TinyModel(max_vocab=511)


def question(game: int) -> str:
    """Each has a number of its own, so that none that is held out is trained on."""
    return f"Game {game}: guess my number, 1 to {MOST}."


def conversation(game: int, number: int) -> list[dict[str, str]]:
    """What the player does, the same in every process."""
    draw = Random(game)
    halves = draw.random() < HALVES
    messages = [{"role": "user", "content": question(game)}]
    low, high = 1, MOST
    for _ in range(MAX_TURNS):
        guess = (low + high) // 2 if halves else draw.randint(low, high)
        messages.append({"role": "assistant", "content": str(guess)})
        said = reply(str(guess), number)
        if not said:
            break
        low, high = (guess + 1, high) if said == "higher" else (low, guess - 1)
        messages.append({"role": "user", "content": said})
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/game"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    draw = Random(0)
    games = [(game, draw.randint(1, MOST)) for game in range(1000, 1000 + sum(SIZES.values()))]
    draw.shuffle(games)
    sets = {name: [games.pop() for _ in range(size)] for name, size in SIZES.items()}
    worked = [{"messages": conversation(*game)} for game in sets.pop("worked")]
    write_jsonl(args.out / "data/worked.jsonl", worked)
    for name, its in sets.items():
        rows = ({"prompt": question(game), "answer": str(number)} for game, number in its)
        write_jsonl(args.out / f"data/{name}.jsonl", rows)
    texts = [message["content"] for row in worked for message in row["messages"]]
    tokenizer = train_tokenizer(
        [*texts, *["user assistant A number, please."] * 9], MODEL.max_vocab
    )
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": marks[1]})
    tokenizer.chat_template = TEMPLATE
    print(tokenizer.apply_chat_template(worked[0]["messages"], tokenize=False))
    write_model(tokenizer, args.out / "model", MODEL, seed=args.seed, overwrite=True)


if __name__ == "__main__":
    main()
