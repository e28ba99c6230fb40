"""Every YAML of examples/: `check` and `plan` take it without weights; the paper's runs are the
paper's. Not exercised here: that they train."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.rules.model import model_of
from sfpo_megatron.planner.memory import num_params

ROOT = Path(__file__).parents[2]
FILES = sorted(f for f in ROOT.glob("examples/*/*.yaml") if (f.parent / "model").is_dir())
IDS = [f"{file.parent.name}-{file.stem}" for file in FILES]
PAPER = {
    "qwen2.5-math-1.5b": (1536, 2560, 0.8),
    "qwen2.5-math-7b": (1536, 2560, 0.8),
    "r1-distill-qwen-1.5b": (2048, 6144, 0.8),
    "r1-distill-qwen-7b": (2048, 6144, 0.8),
    "qwen3-4b-base": (2048, 6144, 0.9),
}
"""Prompt and response tokens, alpha."""
GPU = {"deepseek-v3-671b": "--gpu=h200-141gb"}
"""Examples that are too large for the default."""
BILLIONS = {
    "qwen2.5-math-1.5b": 1.544,
    "qwen2.5-math-7b": 7.616,
    "r1-distill-qwen-1.5b": 1.777,
    "r1-distill-qwen-7b": 7.616,
    "qwen3-4b-base": 4.022,
    "qwen2.5-32b": 32.764,
    "qwen3-30b-a3b": 30.532,
    "llama-3.1-70b": 70.554,
    "deepseek-v3-671b": 671.026,
    "smollm2": 0.135,
}


def test_there_are_all_of_them() -> None:
    """Each with its README, its model and its configs: the paper's runs have a GRPO twin."""
    assert {file.parent.name for file in FILES} == set(BILLIONS)
    for name in BILLIONS:
        folder, twin = ROOT / "examples" / name, {"grpo.yaml"} if name in PAPER else set()
        assert {file.name for file in folder.glob("*.yaml")} == {"config.yaml"} | twin
        assert (folder / "README.md").is_file()
        assert (folder / "model/config.json").is_file()


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_check_and_plan(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    path = file.relative_to(ROOT).as_posix()
    assert cli.main(["check", path]) == 0
    assert cli.main(["plan", path, *on_gpu(path)]) == 0
    assert "\nfits: " in capsys.readouterr().out, "the shipped layout does not fit"


@pytest.mark.parametrize("name", BILLIONS)
def test_sizes_are_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = f"examples/{name}/config.yaml"
    shape = model_of(load_config(file), file=file)
    assert num_params(shape) / 1e9 == pytest.approx(BILLIONS[name], abs=1e-3)


def on_gpu(path: str) -> list[str]:
    name = path.split("/")[1]
    return [GPU[name]] if name in GPU else []


def planned(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[float, float, float, float]:
    """GiB of the fullest rank; seconds of generation, of the passes and of a step."""
    assert cli.main(["plan", *arguments, *on_gpu(arguments[0])]) == 0
    rows = re.findall(r"^(\w+) +([\d. ]+)", capsys.readouterr().out, flags=re.M)
    memory, total = (row for name, row in rows if name == "total")
    generation, passes = (float(dict(rows)[name]) for name in ("generation", "passes"))
    return max(map(float, memory.split())), generation, passes, float(total)


FIGURES = (
    r"(\d+) GiB on a trainer's GPU; a step of (\d+) s, (\d+) of them generation and (\d+) the four"
)
PAPER_FIGURES = (
    r"(\d+) GiB on a GPU, (\d+) s a step with SFPO and (\d+) s with GRPO \((\d+) s of either"
)
SLURM_FIGURES = r"(\d+) GiB a GPU and (\d+) s a step \(one node: (\d+) GiB and (\d+) s\)"


@pytest.mark.parametrize("name", sorted({*BILLIONS} - {"smollm2"}))
def test_the_readme_says_what_plan_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    gib, generation, passes, step = planned([f"examples/{name}/config.yaml"], capsys)
    expected = [gib, step, generation, passes]
    if name in PAPER:
        grpo = planned([f"examples/{name}/grpo.yaml"], capsys)[-1]
        expected = [gib, step, grpo, generation]
    found = figures(f"examples/{name}/README.md", PAPER_FIGURES if name in PAPER else FIGURES)
    assert found == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("name", sorted({*BILLIONS} - {*PAPER, "smollm2"}))
def test_a_job_saves_every_two_hours(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their READMEs submit them to Slurm: what comes after the last checkpoint may be lost."""
    monkeypatch.chdir(ROOT)
    file = f"examples/{name}/config.yaml"
    assert load_config(file).checkpoint.every * planned([file], capsys)[-1] <= 2 * 3600


def test_the_page_on_slurm_says_what_plan_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    config = "examples/qwen2.5-math-7b/config.yaml"
    wide = ["--nodes", "4", "parallel.data=null", "rollout.num_engines=32"]
    expected = [
        plan[place]
        for plan in (planned([config, *wide], capsys), planned([config], capsys))
        for place in (0, -1)
    ]
    assert figures("docs/slurm.md", SLURM_FIGURES) == pytest.approx(expected, abs=0.6)


def figures(page: str, form: str) -> list[float]:
    match = re.search(form, " ".join((ROOT / page).read_text(encoding="utf-8").split()))
    assert match is not None, f"{page} lacks {form}"
    return [float(group) for group in match.groups()]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs(name: str) -> None:
    config = load_config(ROOT / f"examples/{name}/config.yaml")
    train, sfpo, rollout = config.train, config.sfpo, config.rollout
    assert (train.prompts_per_step, train.group_size, train.num_steps) == (256, 8, 400)
    assert train.prompts_per_step // train.minibatches_per_step == 64
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens, sfpo.alpha) == PAPER[name]
    assert (train.optimizer.lr, train.optimizer.betas) == (1e-6, (0.9, 0.999))
    assert (sfpo.num_fast_passes, sfpo.entropy_window, sfpo.entropy_zscore_threshold) == (3, 30, 1)
    assert config.objective.entropy_coef == 0.001 and config.objective.kl.coef == 0
    assert (rollout.temperature, config.eval.n, config.eval.temperature) == (1.0, 4, 1.0)
    assert config.reward.function == "math_boxed" and len(config.data.eval) == 6
    gpus = (config.parallel.data or 0) * config.parallel.model_size
    assert rollout.placement == "colocated"
    assert gpus == rollout.num_engines * rollout.tensor_parallel == 8


@pytest.mark.parametrize("name", PAPER)
def test_the_grpo_twin_is_the_same_but_for_k(name: str) -> None:
    sfpo, grpo = (load_config(ROOT / f"examples/{name}/{f}.yaml") for f in ("config", "grpo"))
    assert grpo.sfpo.num_fast_passes == 0 and grpo.output_dir == f"{sfpo.output_dir}-grpo"
    same = dataclasses.replace(
        grpo, output_dir=sfpo.output_dir, sfpo=dataclasses.replace(grpo.sfpo, num_fast_passes=3)
    )
    assert same == sfpo
