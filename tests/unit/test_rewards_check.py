"""`check` on a reward function of one's own: found in its source, and nothing of it run.

Not exercised: modules that are compiled or make their names at run time; those pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made.configs import write_run

from sfpo_megatron import cli

RAN = "open('ran', 'w').close()\n"


@pytest.fixture
def here(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config whose reward is `mine:score`."""
    monkeypatch.chdir(tmp_path)
    model_dir()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    write_run(
        reward={"function": "mine:score"},
        data={"train": [{"source": "jsonl", "path": "rows.jsonl"}]},
    )
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        "def score(response, prompt): return 1",
        "async def score(response, prompt): return 1",
        "def score(r, p, strict=True, *, weight=1.0): return 1",
        "def score(*args, **kwargs): return 1",
        "import functools\n@functools.cache\ndef score(): return 1",  # what it makes is unknown
        "from elsewhere import one as score",
        "from elsewhere import *",
        "score = make()",
        "class Scorer:\n    def __call__(self, r, p): return 1\nscore = Scorer()",
        "class score:\n    def __init__(self, response, prompt): ...",
        "try:\n    import fast\n    score = fast.score\nexcept ImportError:\n    score = None",
        "if True:\n    def score(r, p): return 1",
        "if True:\n    def score(r, p): return 1\nelse:\n    def score(r): return 1",
        "def __getattr__(name): return lambda r, p: 1",
    ],
)
@pytest.mark.parametrize("batched", ["true", "false"])
def test_what_can_be_a_reward_passes(here: Path, source: str, batched: str) -> None:
    (here / "mine.py").write_text(RAN + source)
    assert cli.main(["check", "run.yaml", f"reward.batched={batched}"]) == 0
    assert not (here / "ran").exists(), "check has run the module"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def other(response, prompt): return 1", "nothing that can be called 'score' in mine"),
        ("", "nothing that can be called 'score' in mine"),
        (
            "def outer():\n    def score(response, prompt): ...",
            "nothing that can be called 'score'",
        ),
        ("def score(response): return 1", "cannot be called with (response, prompt) (it takes 1)"),
        ("async def score(response): return 1", "(response, prompt) (it takes 1)"),
        ("def score(a, b, c): return 1", "cannot be called with (response, prompt) (it wants 3)"),
        ("def score(a, b, *, c): return 1", "(it has a keyword-only parameter without a default)"),
        ("class score:\n    def __init__(self, a): ...", "(response, prompt) (it takes 1)"),
        ("def score(response, prompt) return 1", "is not Python"),
        ("x = '\\0'\nscore = \0", "is not Python"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(
    here: Path, source: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text(RAN + source)
    assert cli.main(["check", "run.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run.yaml: reward.function: found ") and found in line
    assert "expected def score(response: str, prompt: Problem) -> float | Mapping" in line
    assert not (here / "ran").exists(), "check has run the module"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.function=no_such:score", "no module no_such on PYTHONPATH or in "),
        ("reward.function=mine.deep:score", "no module mine.deep on PYTHONPATH"),
        ("reward.function=maths", "found 'maths', expected one of reasoning_gym, exact_match, "),
        ("reward.function=mine.score", "found 'mine.score', expected one of reasoning_gym, "),
        ("reward.function='mine:'", "expected one of reasoning_gym, exact_match, last_number, "),
        ("reward={function: math, batched: true}", "found True, expected false with function math"),
    ],
)
def test_a_name_that_is_none(
    here: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text("def score(r, p): return 1")
    assert cli.main(["check", "run.yaml", override]) == 2
    assert message in capsys.readouterr().err


def test_a_batched_reward_is_told_its_own_form(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").write_text("def score(responses): return []")
    assert cli.main(["check", "run.yaml", "reward.batched=true"]) == 2
    err = capsys.readouterr().err
    assert "(responses, prompts) (it takes 1)" in err
    assert "def score(responses: list[str], prompts: list[Problem]) -> list[float | " in err


def test_modules_on_pythonpath_and_in_packages_are_found(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of the packages above is imported either."""
    package = here / "lib/pack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(RAN)
    (package / "verifiers.py").write_text(f"{RAN}def score(response, prompt): return 1")
    assert cli.main(["check", "run.yaml", "reward.function=pack.verifiers:score"]) == 2
    monkeypatch.syspath_prepend(str(here / "lib"))
    assert cli.main(["check", "run.yaml", "reward.function=pack.verifiers:score"]) == 0
    assert cli.main(["check", "run.yaml", "reward.function=pack.verifiers:other"]) == 2
    assert "nothing that can be called 'other' in pack.verifiers" in capsys.readouterr().err
    assert not (here / "ran").exists()
