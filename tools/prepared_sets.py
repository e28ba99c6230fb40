"""Known problem sets: where each comes from, and how its rows become a question and an answer.

Column names and row counts are those of the datasets as published (their cards on the Hugging Face
hub); the train sets and the six benchmarks are those of the SFPO paper, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfpo_megatron.data.taught import COMPLETION, completion_text
from sfpo_megatron.data.values import is_text, message_text, number_text
from sfpo_megatron.data.written_json import read_written

Record = Mapping[str, Any]


class NoAnswer(ValueError):
    """A row has no answer that can be taken: what was found."""


def plain(value: Any) -> str:
    """A value as the text that a verifier reads: 142, not 142.0; 0.0000001, not 1e-07. NoAnswer for
    what is neither text nor a finite number."""
    text = value if isinstance(value, str) else number_text(value)
    if text is None:
        raise NoAnswer(
            f"an answer that is neither text nor a finite number ({type(value).__name__})"
        )
    return text


def boxed(text: Any) -> str:
    r"""The content of the last \boxed{...} of a solution, braces matched."""
    text = str(text)
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        raise NoAnswer(r"a solution without \boxed{}")
    depth, at = 0, text.index("{", start)
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[at + 1 : end].strip()
    raise NoAnswer(r"a solution whose last \boxed{ is not closed")


def after_hashes(text: Any) -> str:
    """What stands behind the last `####` of a worked solution, thousands separators taken out."""
    _, mark, tail = str(text).rpartition("####")
    if not mark:
        raise NoAnswer("a solution without ####")
    return tail.strip().replace(",", "")


def listed(value: Any) -> str:
    """The answers of a list (or of its JSON) in one text, with commas between them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = read_written(value)
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"a list that is not JSON ({error})") from error
    answers = [plain(item).strip() for item in (value if isinstance(value, list) else [value])]
    answers = [answer for answer in answers if answer]
    if not answers:
        raise NoAnswer("an empty list of answers")
    return ", ".join(answers)


_DAPO_FRAME = re.compile(
    r"\ASolve the following math problem step by step\..*?\n\n(?P<question>.*)\n\n"
    r"Remember to put your answer on its own line after [^\n]*\Z",
    re.DOTALL,
)


def unframed(value: Any) -> str:
    """The question of a prompt: the text of its user message, without the instructions that DAPO's
    release puts around each problem (a run brings its own: `data.prompt_suffix`)."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "user":
            raise NoAnswer("a prompt of other messages than one of the user")
        value = message_text(value[0])
    if not isinstance(value, str):
        raise NoAnswer(f"a prompt that is no text ({type(value).__name__})")
    text = value.strip()
    frame = _DAPO_FRAME.match(text)
    return frame["question"].strip() if frame else text


@dataclass(kw_only=True, frozen=True, slots=True)
class ProblemSet:
    """One set: its source, its columns, and how an answer is taken out of its column."""

    hub: str
    """Repository of the dataset on the Hugging Face hub."""
    split: str
    """Which of its files: those whose name begins with this word, where there are several."""
    config: str = ""
    """Which of its folders, where its files lie in several."""
    is_benchmark: bool
    """Its questions are kept out of the train sets."""
    questions: tuple[str, ...] = ("problem", "question", "prompt")
    """Columns to take the question from: the first that a row has."""
    answers: tuple[tuple[str, Callable[[Any], str]], ...] = (("answer", plain),)
    """The same for the answer, each with how it is read; `a.b` is a key of a mapping."""
    keeps: tuple[str, ...] = ()
    """Further columns to keep, as metadata."""
    completion: str = ""
    """Column of worked solutions, to be `completion`; empty for none."""
    num_rows: int | None = None
    """Rows when published; another number is said."""

    def question(self, row: Record) -> str:
        """The question of a row; NoAnswer if it has none."""
        for name in self.questions:
            if row.get(name):
                return _unicode(unframed(row[name]))
        raise NoAnswer(f"none of the columns {', '.join(self.questions)}")

    def taught(self, row: Record) -> dict[str, str]:
        """The worked solution of a row, if it has one; NoAnswer for what a run would refuse."""
        given = row.get(self.completion)
        if given is None or given == "":
            return {}
        text = completion_text(given, "")
        if not isinstance(text, str):
            raise NoAnswer(f"a completion that is no text ({type(given).__name__})")
        return {COMPLETION: _unicode(text)}

    def answer(self, row: Record) -> str:
        """The answer of a row; NoAnswer if it has none."""
        for name, read in self.answers:
            value: Any = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None and value != "" and (text := read(value).strip()):
                return _unicode(text)
        raise NoAnswer(f"none of the columns {', '.join(name for name, _ in self.answers)}")


def _unicode(text: str) -> str:
    if not is_text(text):
        raise NoAnswer("half of a surrogate pair")
    return text


SETS: dict[str, ProblemSet] = {
    "dapo-math-17k": ProblemSet(
        hub="haizhongzheng/DAPO-Math-17K-cleaned",
        split="train",
        is_benchmark=False,
        answers=(("target", plain), ("reward_model.ground_truth", listed), ("answer", plain)),
    ),
    "lighteval-math": ProblemSet(
        hub="xDAN2099/lighteval-MATH",
        split="train",
        is_benchmark=False,
        answers=(("solution", boxed),),
        keeps=("level", "type"),
        num_rows=7500,
    ),
    "skywork-or1-math": ProblemSet(
        hub="Skywork/Skywork-OR1-RL-Data",
        split="math",
        is_benchmark=False,
        answers=(("reward_model.ground_truth", listed),),
    ),
    "math500": ProblemSet(
        hub="HuggingFaceH4/MATH-500",
        split="test",
        is_benchmark=True,
        keeps=("subject", "level"),
        num_rows=500,
    ),
    "aime24": ProblemSet(
        hub="HuggingFaceH4/aime_2024", split="train", is_benchmark=True, num_rows=30
    ),
    "aime25": ProblemSet(hub="MathArena/aime_2025", split="train", is_benchmark=True, num_rows=30),
    "amc": ProblemSet(
        hub="AI-MO/aimo-validation-amc", split="train", is_benchmark=True, num_rows=83
    ),
    "minerva": ProblemSet(hub="math-ai/minervamath", split="test", is_benchmark=True, num_rows=272),
    "olympiadbench": ProblemSet(
        hub="math-ai/olympiadbench",
        split="test",
        is_benchmark=True,
        answers=(("final_answer", listed), ("answer", listed)),
        keeps=("subfield",),
    ),
    "gsm8k": ProblemSet(
        hub="openai/gsm8k",
        config="main",
        split="test",
        is_benchmark=True,
        answers=(("answer", after_hashes),),
        num_rows=1319,
    ),
}
