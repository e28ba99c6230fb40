"""What people's own reward functions do: each line is a fault that once cost a run, or its rewards.

One pool for all: what one response does must not reach the others. What may be returned is in
test_rewards_returned.py, what else harms a process in test_rewards_pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_rewards import log_of, problem, rewards

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards.pool import ScoringPool, VerifierError

SOURCE = """
import os, sys, threading, time
def forever():
    while True: time.sleep(0.05)
def deep(n): return deep(n + 1) + 1
class Odd:
    def __float__(self): raise RuntimeError("no number")
    def __repr__(self): raise RuntimeError("no repr")
def score(response, prompt):
    what = prompt.answer if prompt.answer.startswith("also ") else response
    match what.removeprefix("also "):
        case "42": return 1
        case "prints": print("x" * 100_000); print("y" * 100_000, file=sys.stderr); return 1
        case "writes": os.write(1, b"z" * 200_000); sys.stdout.buffer.write(b"w"); return 1
        case "numpy": import numpy; return numpy.float32(0.5)
        case "numpy in a mapping":
            import numpy
            return {"reward": numpy.bool_(True), "n": numpy.int8(3)}
        case "none": return None
        case "text": return "1"
        case "array": import numpy; return numpy.array([0.5])
        case "odd": return Odd()
        case "sys.exit": sys.exit()
        case "sys.exit 0": sys.exit(0)
        case "exit": exit()
        case "os._exit": os._exit(0)
        case "abort": os.abort()
        case "kill": os.kill(os.getpid(), 9)
        case "generator": raise GeneratorExit
        case "interrupt": raise KeyboardInterrupt
        case "group": raise BaseExceptionGroup("g", [SystemExit(1)])
        case "thread": threading.Thread(target=forever).start(); return 1
        case "daemon": threading.Thread(target=forever, daemon=True).start(); return 1
        case "thread that raises": threading.Thread(target=lambda: 1 / 0).start(); return 1
        case "child": os.system("sleep 1000 &"); return 1
        case "recursion": return deep(0)
        case "recursion in data":
            found = []
            for _ in range(100_000): found = [found]
            return repr(found)
        case "memory": return len(bytearray(1 << 33))
        case "memory bit by bit":
            held = []
            while True: held.append(bytearray(1 << 27))
    return 0
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringPool]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PYTHONPATH", raising=False)
        config = RewardConfig(function="faulty:score", timeout_s=20.0)
        with ScoringPool(config, RunDirectory.of("run")) as opened:
            yield opened


@pytest.mark.parametrize(
    ("what", "reward"),
    [
        *(("prints", 1.0), ("writes", 1.0), ("numpy", 0.5), ("numpy in a mapping", 1.0)),
        *(("thread", 1.0), ("daemon", 1.0), ("thread that raises", 1.0), ("child", 1.0)),
        *((what, 0.0) for what in ("sys.exit", "sys.exit 0", "exit", "os._exit", "abort", "kill")),
        *((what, 0.0) for what in ("generator", "interrupt", "group")),
        *((what, 0.0) for what in ("recursion", "recursion in data")),
        *((what, 0.0) for what in ("memory", "memory bit by bit")),
    ],
)
def test_one_response_costs_no_other(pool: ScoringPool, what: str, reward: float) -> None:
    scores = pool.score([(problem(), text) for text in ("42", what, "42", "41")])
    assert rewards(scores) == [1.0, reward, 1.0, 0.0]
    assert not any(score.timed_out for score in scores)


@pytest.mark.parametrize("what", ["sys.exit", "sys.exit 0", "exit", "interrupt", "recursion"])
def test_what_it_does_on_the_reference_too_ends_the_run(pool: ScoringPool, what: str) -> None:
    with pytest.raises(VerifierError, match=r"prompt p/9: reward\.function faulty:score raised"):
        pool.score([(problem(), "42"), (problem(f"also {what}", "p/9"), "x")])


@pytest.mark.parametrize(
    ("what", "found"),
    [
        *(("none", "None"), ("text", "'1' (str)"), ("array", "array([0.5]) (ndarray)")),
        ("odd", " (Odd)"),
    ],
)
def test_what_is_no_score_names_prompt_and_function(
    pool: ScoringPool, what: str, found: str
) -> None:
    with pytest.raises(VerifierError) as caught:
        pool.score([(problem(), "42"), (problem(name="p/9"), what)])
    message = str(caught.value)
    assert message.startswith("prompt p/9: reward.function faulty:score returned no score: found ")
    assert found in message


def test_what_is_printed_is_in_the_log(pool: ScoringPool) -> None:
    pool.score([(problem(), "prints"), (problem(), "writes")])
    assert Path("run").is_dir() and "x" * 100_000 in log_of() and "y" * 100_000 in log_of()
