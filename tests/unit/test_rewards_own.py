"""A reward function of one's own through the real scoring processes.

What may be returned is in test_rewards_returned.py, hostile responses in test_rewards_pool.py,
batches in test_rewards_batched.py, output and files in test_rewards_output.py. Not exercised: a
pool in a Ray actor (tests/e2e).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from own_rewards import Own, log_of, own, problem, rewards

from sfpo_megatron.config.tree import RewardConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards import WrongReward
from sfpo_megatron.rewards.pool import ScoringPool, VerifierError

__all__ = ["own"]  # the fixture

# ---- what it is given, where it is found ----------------------------------------------------


def test_it_gets_the_response_and_the_problem(own: Own) -> None:
    pool = own("""
def score(response, prompt):
    given = response, prompt.id, prompt.question, prompt.answer, prompt.metadata
    return given == ("é\\ud800", "p/3", "6 * 7 =", "42", {"unit": ["cm", None], "n": 2})
""")
    prompt = problem(name="p/3", unit=["cm", None], n=2)
    assert rewards(pool.score([(prompt, "é\ud800"), (prompt, "e")])) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("source", "function"),
    [
        ("class Scorer:\n    def __call__(self, r, p): return 1\nscore = Scorer()", "score"),
        ("import functools\nscore = functools.partial(lambda x, r, p: x, 1)", "score"),
        ("class Scorer:\n    @staticmethod\n    def at(r, p): return 1\nat = Scorer.at", "at"),
        ("def score(*args): return len(args) - 1", "score"),
        ("def score(r, p, strict=True): return strict", "score"),
        ("async def score(r, p): return 1", "score"),
        ("class Scorer:\n    async def __call__(self, r, p): return 1\nscore = Scorer()", "score"),
        ("import asyncio\ndef score(r, p): return asyncio.sleep(0, 1)", "score"),
    ],
)
def test_what_can_be_called(own: Own, source: str, function: str) -> None:
    assert rewards(own(source, function).score([(problem(), "x")] * 2)) == [1.0, 1.0]


def test_it_is_found_on_pythonpath_below_a_package_and_beside_a_stdlib_name(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory comes last: a json.py there is not what the process imports."""
    (tmp_path / "lib/pack/deep").mkdir(parents=True)
    (tmp_path / "lib/pack/deep/er.py").write_text("from helper import one as score")
    (tmp_path / "lib/helper.py").write_text("def one(r, p): return 1")
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("PYTHONPATH", "lib")
    pool = own("", function="pack.deep.er:score")
    assert rewards(pool.score([(problem(), "x")])) == [1.0]


def test_warm_up_is_not_timed(own: Own) -> None:
    pool = own(
        "import time\nready = []\n"
        "def warm_up(): time.sleep(1.0); ready.append(1)\n"
        "def score(r, p): return ready[0]\n",
        timeout_s=0.5,
    )
    (score,) = pool.score([(problem(), "x")])
    assert score.reward == 1.0 and not score.timed_out


def test_its_threads_may_use_every_core(own: Own) -> None:
    """The kernel's limit on CPU seconds does not end a function that is in time."""
    pool = own("""
import resource, time
def score(response, prompt):
    limit, _ = resource.getrlimit(resource.RLIMIT_CPU)
    return {"reward": 1.0, "left": limit - time.process_time()}
""")
    (score,) = pool.score([(problem(), "x")])
    num_cores = len(os.sched_getaffinity(0))
    assert 20 * num_cores <= score.parts["left"] <= 20 * num_cores + 3


def test_async_calls_share_a_loop(own: Own) -> None:
    """A client that is opened in the first call can be used in all."""
    pool = own("""
import asyncio
loops = []
async def score(response, prompt):
    loops.append(asyncio.get_running_loop())
    if response == "exit": raise SystemExit(2)
    if response == "cancel": raise asyncio.CancelledError
    await asyncio.sleep(0.001)
    return all(loop is loops[0] for loop in loops)
""")
    responses = ["a", "exit", "b", "cancel", "c"]
    assert rewards(pool.score([(problem(), r) for r in responses])) == [1, 0, 1, 0, 1]


# ---- what it returns ------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_a_partial_reward_is_no_correct_answer(own: Own, batched: bool) -> None:
    one = "def score(response, prompt): return float(response)"
    many = "def score(responses, prompts): return [float(each) for each in responses]"
    pool = own(many if batched else one, batched=batched)
    scores = pool.score([(problem(), text) for text in ("0", "0.1", "0.999", "1")])
    assert rewards(scores) == [0, 0.1, 0.999, 1]
    assert [score.correct for score in scores] == [False, False, False, True]


def test_parts_come_back_by_name(own: Own) -> None:
    pool = own("""
def score(response, prompt):
    parts = {"format": 0.2, "length": len(response)} if response else {}
    return {"reward": response == prompt.answer, **parts}
""")
    right, wrong, empty = pool.score([(problem(), r) for r in ("42", "420", "")])
    assert (right.reward, right.correct, right.parts) == (1.0, True, {"format": 0.2, "length": 2.0})
    assert (wrong.reward, wrong.correct, wrong.parts) == (0, False, {"format": 0.2, "length": 3.0})
    assert (empty.reward, empty.parts) == (0.0, {})


def test_a_numpy_scalar_and_a_torch_tensor_are_numbers(own: Own) -> None:
    """Imported in the scoring process: its memory limit leaves room for both."""
    pool = own("""
import numpy, torch
def score(response, prompt):
    return {"numpy": numpy.float32(0.5), "torch": torch.tensor(0.25)}[response]
""")
    assert rewards(pool.score([(problem(), "numpy"), (problem(), "torch")])) == [0.5, 0.25]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("None", "found None"),
        ("'1'", "found '1' (str)"),
        ("float('nan')", "found nan (float)"),
        ("2.0", "found 2.0 (float)"),
        ("[1.0]", "found [1.0] (list)"),
        ("{'format': 1.0}", "found {'format': 1.0} (dict), expected an entry 'reward'"),
        ("(x for x in [1.0])", "(generator)"),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_no_score_is_an_error(own: Own, value: str, found: str, batched: bool) -> None:
    """It names prompt and function, and the pool goes on."""
    one = f"({value}) if response == 'bad' else 1"
    pool = own(
        f"def score(response, prompt): return {one}\n"
        f"def many(rs, ps): return [({one}) for response in rs]",
        "many" if batched else "score",
        batched=batched,
    )
    items = [(problem(), "good"), (problem(name="p/7"), "bad"), (problem(), "good")]
    with pytest.raises(VerifierError) as caught:
        pool.score(items)
    name = "many" if batched else "score"
    assert f"prompt p/7: reward.function mine:{name} returned no score: " in str(caught.value)
    assert found in str(caught.value) and "; correct the function" in str(caught.value)
    assert rewards(pool.score([(problem(), "good")])) == [1.0]


# ---- what it raises -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["KeyError('x')", "SystemExit(3)", "KeyboardInterrupt()"])
@pytest.mark.parametrize("batched", [False, True])
def test_an_exception_is_told_apart_by_the_reference_answer(
    own: Own, what: str, batched: bool
) -> None:
    """The response alone: 0. The reference answer too: an error with the traceback."""
    pool = own(
        f"""
def score(response, prompt):
    if response == "bad" or prompt.answer == "broken":
        raise {what}
    return 1.0
def many(responses, prompts):
    return [score(*item) for item in zip(responses, prompts, strict=True)]
""",
        "many" if batched else "score",
        batched=batched,
    )
    items = [(problem(), "good"), (problem(), "bad"), (problem(), "good")]
    scores = pool.score(items)
    assert rewards(scores) == [1.0, 0.0, 1.0] and not any(s.timed_out for s in scores)
    name = what.partition("(")[0]
    assert f"prompt p/0: this response alone made the function raise {name}" in log_of()
    with pytest.raises(VerifierError, match=r"prompt p/9: .* answer 'broken' too") as caught:
        pool.score([*items, (problem("broken", "p/9"), "good")])
    assert f"raise {what}\n{name}" in str(caught.value), "no traceback"


def test_a_reference_answer_without_a_score_is_an_error(own: Own) -> None:
    pool = own("def score(response, prompt): return None if response == '42' else 1 / 0")
    with pytest.raises(VerifierError, match="no score: for the reference answer found None"):
        pool.score([(problem(), "bad")])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("score = 1", r"reward\.function: found nothing that can be called 'score' in mine"),
        ("def score(response): return 1", r"found mine:score, which cannot be called with \(resp"),
        ("def score(a, b, c): return 1", r"cannot be called with \(response, prompt\)"),
        ("import not_there", r"mine does not import \(ModuleNotFoundError: No module named"),
        ("def score(: pass", r"mine does not import \(SyntaxError"),
        ("1 / 0", r"mine does not import \(ZeroDivisionError"),
        ("raise SystemExit('no licence')", r"mine does not import \(SystemExit: no licence"),
        ("def score(r, p): return 1\ndef warm_up(): raise OSError('no disk')", "OSError: no disk"),
    ],
)
def test_a_function_that_cannot_be_loaded(own: Own, source: str, message: str) -> None:
    with pytest.raises(VerifierError, match=message) as caught:
        own(source)
    assert "the traceback is in " in str(caught.value)
    assert "Traceback (most recent call last)" in log_of()


@pytest.mark.parametrize(
    ("raised", "passes"),
    [
        ("OSError('no disk')", False),
        ("ConnectionError('the judge is away')", True),
        ("OSError(116, 'Stale file handle')", True),
    ],
)
def test_whether_another_start_could_load_it(own: Own, raised: str, passes: bool) -> None:
    with pytest.raises(VerifierError, match=r"reward\.function: mine:score raised") as caught:
        own(f"def score(r, p): return 1\ndef warm_up(): raise {raised}")
    assert isinstance(caught.value, WrongReward) is not passes


def test_a_process_that_ends_while_it_starts(own: Own) -> None:
    """The message has its exit code and what it printed last."""
    source = "import os\nprint('bye', flush=True)\nos._exit(7)"
    with pytest.raises(VerifierError, match=r"mine:score: its scoring process did not") as caught:
        own(source)
    assert "(exit code 7)" in str(caught.value) and str(caught.value).endswith("bye")


def test_a_module_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VerifierError, match=r"'no_such:score', but no_such does not import"):
        ScoringPool(RewardConfig(function="no_such:score"), RunDirectory.of("run"))
