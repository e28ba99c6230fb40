"""A user's own loss and advantage: used as the built-in ones are, and refused by name if wrong.

Not exercised here: the names of statistics over real ranks (tests/dist/test_statistics.py), a whole
run with a loss of its own (tests/e2e/test_cli_run.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made.configs import AIW, run_config
from ragged import Ragged, objective_of, ragged, run
from torch import Tensor

from sfpo_megatron import cli
from sfpo_megatron.config.objective import ObjectiveConfig, OverlongConfig
from sfpo_megatron.config.rules.plugins import own_code
from sfpo_megatron.objectives.advantage import advantages_of, shaped_rewards
from sfpo_megatron.plugins import ADVANTAGE, LOSS, PluginError

ROOT = Path(__file__).parents[2]

OWN = """
import torch
def reinforce(tokens, config):
    return -tokens.ratio * tokens.advantages
def with_statistics(tokens, config):
    beyond = torch.where(tokens.loss_mask, tokens.ratio, torch.nan)
    statistics = {"z_long": beyond > config.loss_args["bound"], "a_square": beyond**2}
    return reinforce(tokens, config), statistics
def says_what_it_clipped(tokens, config):
    return reinforce(tokens, config), {"clip_frac_low": torch.ones_like(tokens.loss_mask)}
def too_few(tokens):
    return tokens.ratio
def summed(tokens, config):
    return (tokens.ratio * tokens.advantages).sum()
def nothing(tokens, config):
    reinforce(tokens, config)
def three(tokens, config):
    return (tokens.ratio,) * 3
def a_list(tokens, config):
    return tokens.ratio, [tokens.ratio]
def a_number(tokens, config):
    return tokens.ratio, {"kl": 0.5}
def a_mean(tokens, config):
    return tokens.ratio, {"kl": tokens.ratio.mean()}
def unnamed(tokens, config):
    return tokens.ratio, {3: tokens.ratio}
def taken(tokens, config):
    return tokens.ratio, {"entropy": tokens.ratio}
def taken_later(tokens, config):
    return tokens.ratio, {"ref_kl": tokens.ratio}
def raises(tokens, config):
    return tokens.ratio * config.loss_args["beta"]
def detached(tokens, config):
    return -tokens.ratio.detach() * tokens.advantages
number = 3

def above_the_worst(rewards, group_size, config):
    groups = rewards.view(-1, group_size)
    return (config.advantage_args["scale"] * (groups - groups.min(1, True).values)).flatten()
def by_group(rewards, group_size, config):
    return rewards.view(-1, group_size)
def one_nan(rewards, group_size, config):
    return torch.where(torch.arange(len(rewards)) == 2, torch.nan, rewards)
def too_large(rewards, group_size, config):
    return rewards.double() + 1e300
def plain_list(rewards, group_size, config):
    return rewards.tolist()
def leaves(rewards, group_size, config):
    raise SystemExit(0)
def divides(rewards, group_size, config):
    return rewards / (group_size - 4 // 0)
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


def gradient(data: Ragged, **settings: Any) -> Tensor:
    data.new.grad = None
    run(data, ObjectiveConfig(**settings))[0].backward()
    assert data.new.grad is not None
    return data.new.grad.clone()


# ---- found, or refused ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LOSS, ADVANTAGE], ids=lambda kind: kind.key)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:loss", "no_such_module does not import"),
        ("leaves:loss", r"leaves does not import \(SystemExit: 0\)"),
        ("own:missing", r"nothing that can be called 'missing' in own .*, expected def "),
        ("own:number", "nothing that can be called 'number'"),
        ("own:too_few", r"own:too_few, which cannot be called with \("),
    ],
)
def test_own_code_that_cannot_be_had_is_refused(kind: Any, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=rf"^{kind.key}: found .*{message}"):
        kind.load(name)


def test_every_built_in_name_can_be_had() -> None:
    for kind in (LOSS, ADVANTAGE):
        for name in kind.built_in:
            assert kind.load(name).__name__ == name


@pytest.mark.parametrize(
    ("loss", "advantage", "wrong"),
    [
        ("own:reinforce", "own:by_group", []),
        ("ppo_clip", "rloo", []),
        ("own:too_few", "own:by_group", ["objective.loss"]),
        ("own:reinforce", "own:missing", ["objective.advantage"]),
        ("none:such", "own:reinforce", ["objective.loss", "objective.advantage"]),
    ],
)
def test_check_finds_them_without_an_import(loss: str, advantage: str, wrong: list[str]) -> None:
    config = replace(run_config(), objective=ObjectiveConfig(loss=loss, advantage=advantage))
    assert [problem.key for problem in own_code(config)] == wrong
    assert "own" not in sys.modules


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.loss=own:reinforce", None),
        ("objective.loss=none:such", "objective.loss: found 'none:such', but no module none on "),
        ("objective.advantage=json:dumps", "which cannot be called with (rewards, group_size, "),
    ],
)
def test_check_says_so(
    override: str,
    message: str | None,
    tmp_path: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model_dir()
    task = str(AIW)
    code = cli.main(["check", task, "model.path=model", override])
    assert code == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err


# ---- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"]
)
def test_own_loss_is_used_and_aggregated_like_the_built_in_ones(aggregation: str) -> None:
    settings = {"aggregation": aggregation, "ratio": "sequence", "entropy_coef": 0.1}
    data = ragged(9)
    own = gradient(data, loss="own:reinforce", **settings)
    assert torch.equal(own, gradient(data, loss="no_clip", **settings))


def test_own_statistics_are_summed_over_the_tokens_of_the_loss() -> None:
    """Against a loop over rollouts; outside the mask they are NaN, and may be."""
    data = ragged(5)
    config = ObjectiveConfig(loss="own:with_statistics", loss_args={"bound": 1.5})
    _, found = run(data, config)
    ratios = [
        r
        for _, span in data.responses()
        for r in (data.new[span] - data.old[span]).exp().double().tolist()
    ]
    assert found["a_square"] == pytest.approx(sum(r**2 for r in ratios), rel=1e-5)
    assert found["z_long"] == sum(r > 1.5 for r in ratios) > 5
    assert list(found)[4:6] == ["a_square", "z_long"], "any order of the dict gives one of the row"


def test_a_loss_that_does_not_say_what_it_clipped_has_the_ratios_outside_the_bounds() -> None:
    clip = {"clip_low": 0.1, "clip_high": 0.3}
    data = ragged(6)
    _, cispo = run(data, ObjectiveConfig(loss="cispo", **clip))  # its bounds whatever the sign of A
    _, silent = run(data, ObjectiveConfig(loss="own:reinforce", **clip))
    assert silent == cispo and min(cispo["clip_frac_low"], cispo["clip_frac_high"]) > 5
    _, said = run(data, ObjectiveConfig(loss="own:says_what_it_clipped", **clip))
    assert said["clip_frac_low"] == data.batch.response_lengths.sum()
    assert said["clip_frac_high"] == silent["clip_frac_high"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("summed", r"gave losses of shape \(\), expected one a token, \(\d+,\)"),
        ("nothing", "gave None, expected a tensor of token losses"),
        ("three", "gave a tuple of 3, expected a tensor of token losses"),
        ("a_list", "gave a tuple of 2, expected"),
        ("a_number", "gave a float as statistic 'kl', expected .* tensor of one value a token"),
        ("a_mean", r"gave statistic 'kl' of shape \(\)"),
        ("unnamed", "named a statistic 3, expected a name of text"),
        ("taken", "named a statistic 'entropy', which every pass logs already"),
        ("taken_later", "named a statistic 'ref_kl', which every pass logs already"),
        ("raises", "raised KeyError: 'beta', expected def loss"),
        ("detached", "gave losses without a gradient"),
    ],
)
def test_a_loss_that_gives_what_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=rf"objective\.loss: found own:{name}, which {message}"):
        run(ragged(0), ObjectiveConfig(loss=f"own:{name}"))


def test_a_loss_without_a_gradient_may_stand_beside_a_bonus() -> None:
    data = ragged(1)
    run(data, ObjectiveConfig(loss="own:detached", entropy_coef=0.1))[0].backward()
    assert data.new.grad is None and data.entropy.grad is not None


# ---- the advantage --------------------------------------------------------------------------


def test_own_advantage_gets_the_shaped_rewards() -> None:
    batch = ragged(0).batch
    config = ObjectiveConfig(
        advantage="own:above_the_worst",
        advantage_args={"scale": 3.0},
        overlong=OverlongConfig(buffer_tokens=6, penalty=0.5),
    )
    rewards = shaped_rewards(batch, 12, config)
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, batch.rewards)
    found = advantages_of(rewards, batch.group_size, config)
    groups = rewards.view(-1, batch.group_size).tolist()
    wanted = [3 * (reward - min(group)) for group in groups for reward in group]
    assert found.tolist() == pytest.approx(wanted) and found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("by_group", r"gave a shape \(2, 4\), expected a tensor of shape \(8,\)"),
        ("one_nan", r"gave nan for rollout 2 \(reward 0.25, 1 of 8 like it\), expected finite"),
        ("too_large", r"gave inf for rollout 0 \(reward 0, 8 of 8 like it\)"),
        ("plain_list", "gave a list of 8, expected a tensor"),
        ("divides", "raised ZeroDivisionError: .*, expected def advantages"),
        ("leaves", "raised SystemExit: 0, expected def advantages"),
    ],
)
def test_an_advantage_that_is_none_is_refused(name: str, message: str) -> None:
    config = ObjectiveConfig(advantage=f"own:{name}")
    expected = rf"objective\.advantage: found own:{name}, which {message}"
    with pytest.raises(PluginError, match=expected):
        advantages_of(torch.arange(8) / 8, 4, config)


# ---- examples/your_own ----------------------------------------------------------------------


def test_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found from the root of the repository, by `check` too, and they do what they say."""
    monkeypatch.chdir(ROOT)
    config = ObjectiveConfig(
        loss="examples.your_own.loss:loss",
        loss_args={"max_ratio": 1.2},
        advantage="examples.your_own.advantage:advantages",
        advantage_args={"scale": 2.0},
        clip_low=1.0,
        clip_high=0.2,
    )
    assert not list(own_code(replace(run_config(), objective=config)))
    found = advantages_of(torch.tensor([0.0, 1, 0, 0, 1, 1, 0, 1]), 4, config)
    assert found.tolist() == [0, 2, 0, 0, 0, 0, -2, 0]
    data = ragged(2)
    loss, stats = run(data, config)
    ratios, wanted = 0, 0.0
    for index, span in data.responses():
        for ratio in (data.new[span] - data.old[span]).exp().double().tolist():
            wanted -= min(ratio, 1.2) * float(data.advantages[index])
            ratios += ratio > 1.2
    count = int(data.batch.response_lengths.sum())
    assert loss.item() == pytest.approx(wanted / count, rel=1e-5)
    assert 0 < stats["bounded"] == ratios < count


def test_a_users_module_is_found_beside_the_config_without_pythonpath(tmp_path: Path) -> None:
    """In a process of its own, as `check` and a rank start: from the working directory."""
    code = (
        "from sfpo_megatron.plugins import ADVANTAGE as a; a.find('own:by_group'); "
        "import sys; assert 'own' not in sys.modules and 'torch' not in sys.modules; "
        "print(a.load('own:by_group').__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "own"


def test_names_travel_with_the_terms() -> None:
    """The names of ours are those of the objective's settings, known from its first call."""
    assert objective_of(ObjectiveConfig()).loss is LOSS.load("ppo_clip")
    _, found = run(ragged(0), ObjectiveConfig())
    assert list(found) == ["ratio_mean", "ppo_kl", "clip_frac_low", "clip_frac_high", "ratio_max"]
