"""`sfpo-megatron train` as a user runs it: launcher, ranks, Ray, vLLM, refit, outputs.

Not exercised here: learning (examples/demo, `make test-full`), layouts beyond TP=2 (tests/dist).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import digits
import pytest
import torch

from sfpo_megatron import cli
from sfpo_megatron.outputs.cost_metrics import COSTS
from sfpo_megatron.outputs.declared import undeclared
from sfpo_megatron.outputs.metric_list import EVALUATION, TRAIN_STEP

KEYS = {
    *("step", "num_rollouts", "reward_mean", "accuracy", "entropy", "loss", "grad_norm"),
    *("clip_frac", "ratio_mean_first_pass", "ppo_kl_first_pass", "logprob_diff_mean"),
    *("logprob_diff_max", "sfpo_active", "num_passes", "num_optimizer_steps"),
    *("num_skipped_steps", "weight_version"),
    *(f"time/{phase}_s" for phase in ("generate", "reward", "logprob", "passes")),
    *(f"time/{phase}_s" for phase in ("reposition", "refit", "step")),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run directory, output) of 3 steps at TP=2 with stop_step 3, rollouts saved, samples shown
    at the first step and every second."""
    folder = tmp_path_factory.mktemp("cli")
    model = digits.make_model(folder / "model")
    config = digits.write_config(
        folder,
        model,
        sfpo={"stop_step": 3},
        tracking={"samples": {"every": 2}},
        debug={"save_rollouts": str(folder / "rollouts.safetensors")},
        trace={"steps": [2, 3]},
    )
    return folder / "run", digits.train(config)


def test_metrics_of_every_step(finished: tuple[Path, str]) -> None:
    train, evals = digits.read_metrics(finished[0])
    assert [line["step"] for line in train] == [1, 2, 3]
    assert [line["step"] for line in evals] == [0, 3]
    for line in train:
        assert line.keys() >= KEYS, KEYS - line.keys()
        assert line["num_rollouts"] == 128 * line["step"]
        assert line["weight_version"] == line["step"]
        assert line["grad_norm"] > 0
        assert line["num_skipped_steps"] == 0
        # The same packs and kernels before and during the first pass: bitwise the same log-probs.
        assert abs(line["ppo_kl_first_pass"]) < 1e-6
        assert line["logprob_diff_mean"] < 1e-4
        assert math.isclose(line["ratio_mean_first_pass"], 1.0, abs_tol=1e-6)
        check_passes(line)
    assert [line["num_passes"] for line in train] == [4, 4, 1]
    assert [line["sfpo_active"] for line in train] == [True, True, False]
    assert [line["num_optimizer_steps"] for line in train] == [8, 16, 18]


def test_a_line_has_declared_metrics_only(finished: tuple[Path, str]) -> None:
    """And what is only measured adds up."""
    train, evals = digits.read_metrics(finished[0])
    for line in train:
        assert not undeclared(line, (*TRAIN_STEP, *COSTS))
        assert line["time/passes_s"] < line["time/step_s"] and line["speed/tokens_per_s"] > 0
        assert line["speed/training_tokens_per_s"] > line["speed/tokens_per_s"]
        # Two ranks and one engine.
        per_device = line["speed/tokens_per_s_per_device"]
        assert math.isclose(3 * per_device, line["speed/tokens_per_s"])
        assert 0 < line["speed/mfu"] < 1 < line["speed/model_flops_per_s"]
        assert line["ranks/passes_min_s"] <= line["time/passes_s"] <= line["ranks/passes_max_s"]
        assert line["ranks/passes_slowest"] in (0, 1) and line["ranks/refit_slowest"] in (0, 1)
        assert 0 < line["memory/passes_peak_bytes"] <= line["memory/step_peak_bytes"]
        assert 0 < line["kv_cache_usage_max"] <= 1 and line["num_preemptions"] == 0
        assert 0 < line["engines/busy"] <= 1 and line["engines/queue_s"] > 0
        spread = [line[f"response_tokens_{p}"] for p in ("p10", "p50", "p90", "max")]
        assert spread == sorted(spread) and spread[0] >= 1
        assert line["solved_by_all"] + line["solved_by_none"] <= line["zero_variance_groups"] + 1e-9
    for line in evals:
        assert not undeclared(line, EVALUATION)


def test_samples_on_the_console_and_in_their_file(finished: tuple[Path, str]) -> None:
    run, output = finished
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    for line in lines:
        assert line["prompt"].endswith("=") and line["answer"] and len(line["responses"]) == 8
        for response in line["responses"]:
            assert response["correct"] == (response["reward"] >= 1)
            assert response["num_tokens"] >= 1
        assert f"prompt {line['prompt_id']}  reference: {line['answer']}" in output
    assert output.count("sample rollouts") == 2


def check_passes(line: dict[str, Any]) -> None:
    """`pass_k/...` of each pass; the last is the slow correction, the first starts at ratio 1."""
    last = line["num_passes"]
    names = {name.split("/")[0] for name in line if name.startswith("pass_")}
    assert names == {f"pass_{k}" for k in range(1, last + 1)}
    for name in ("loss", "entropy", "grad_norm", "ppo_kl"):
        assert line[f"pass_{last}/{name}"] == line[name]
    clipped = line[f"pass_{last}/clip_frac_low"] + line[f"pass_{last}/clip_frac_high"]
    assert math.isclose(clipped, line["clip_frac"])
    for k in range(1, last + 1):
        assert line[f"pass_{k}/ratio_max"] >= line[f"pass_{k}/ratio_mean"] > 0


def test_outputs_and_table(finished: tuple[Path, str]) -> None:
    run, output = finished
    for name in ("config.yaml", "metrics.jsonl", "plot.png", "hf/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    assert "held-out accuracy" in output and f"report: {run / 'report.html'}" in output
    page = (run / "report.html").read_text(encoding="utf-8")
    (start,) = (run / "environment.jsonl").read_text().splitlines()
    versions = json.loads(start)
    assert all(versions[name] in page for name in ("torch", "megatron-core", "commit", "hardware"))
    for warning in ("Warning", "DEPRECATED", "not provided", "No CUDA runtime"):
        assert warning not in output, "warnings of dependencies reach the user's console"


def test_a_step_is_drawn_over_all_processes(finished: tuple[Path, str]) -> None:
    """Every process, on one clock: what one waits for lies where another does it."""
    folder = finished[0] / "trace"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step_0000002.json", "step_0000003.json")
    ]
    events = json.loads((folder / "step_0000002.json").read_text())["traceEvents"]
    named = [event for event in events if event["name"] == "process_name"]
    names = {event["pid"]: event["args"]["name"].split(" (")[0] for event in named}
    assert list(names.values()) == ["rank 0", "rank 1", "controller", "engine 0"]
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in (e for e in events if e["ph"] == "X"):
        times = event["ts"], event["ts"] + event["dur"]
        spans.setdefault((names[event["pid"]], event["name"]), []).append(times)
    for rank in ("rank 0", "rank 1"):
        wanted = {"step": 1, "passes": 4, "forward_backward": 8, "reposition": 1}
        for name, number in wanted.items():
            assert len(spans[rank, name]) == number, (rank, name)
    (step,), (collect,) = spans["rank 0", "step"], spans["rank 0", "collect"]
    (refit,), (rollouts,) = spans["rank 0", "refit"], spans["controller", "rollouts"]
    assert step[0] == 0 and inside(collect, step) and inside(refit, step)
    assert inside(rollouts, collect)
    for name, whole in {"generate": rollouts, "load_bucket": refit}.items():
        assert spans["engine 0", name] and all(inside(s, whole) for s in spans["engine 0", name])
    assert all(inside(score, rollouts) for score in spans["controller", "score"])


def inside(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    return outer[0] <= inner[0] <= inner[1] <= outer[1]


def test_the_run_says_of_its_data_what_check_says(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = finished
    assert cli.main(["check", str(run / "config.yaml"), "--data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train"][0]["kept"] > 0 and found["summary"] in output


def test_exported_policy_loads_and_differs_from_the_start(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished[0]
    trained = AutoModelForCausalLM.from_pretrained(run / "hf").state_dict()
    start = AutoModelForCausalLM.from_pretrained(run.parent / "model").state_dict()
    assert trained.keys() == start.keys()
    moved = [not torch.equal(trained[name], start[name]) for name in start]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(run / "hf").eos_token == "<eos>"


def test_saved_rollouts_train_to_the_same_weights(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """`debug.train_only` with the written config.yaml: no engine, the same three steps, bit for
    bit, and data-parallel instead of tensor-parallel: the same up to fp32 summation order."""
    run = finished[0]
    saved = f"debug.train_only={run.parent / 'rollouts.safetensors'}"
    live, _ = digits.read_metrics(run)
    for layout, tolerance in (({}, 0.0), ({"parallel.tensor": 1, "parallel.data": 2}, 1e-5)):
        again = tmp_path / f"again-{len(layout)}"
        overrides = [f"{key}={value}" for key, value in layout.items()]
        digits.train(
            run / "config.yaml",
            f"output_dir={again}",
            saved,
            "debug.save_rollouts=null",
            *overrides,
        )
        replayed, _ = digits.read_metrics(again)
        for a, b in zip(live, replayed, strict=True):
            assert abs(a["loss"] - b["loss"]) <= tolerance, (layout, a["step"])
        assert_same_weights(run / "hf", again / "hf", 0.0 if not layout else 1e-4)


OWN_CODE = """
import torch
def loss(tokens, config):
    bound = config.loss_args["bound"]
    one = torch.ones_like(tokens.ratio)
    return -tokens.ratio.clamp(max=bound) * tokens.advantages, {"one": one}
def advantages(rewards, group_size, config):
    groups = rewards.view(-1, group_size)
    return (config.advantage_args["scale"] * (groups - groups.mean(1, True))).flatten()
"""


def test_objective_settings(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss and an advantage of one's own, with settings and a statistic, a sequence ratio,
    weights against the generator and a KL in the reward, on the saved rollouts."""
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = finished[0]
    digits.train(
        run / "config.yaml",
        f"output_dir={tmp_path / 'run'}",
        f"debug.train_only={run.parent / 'rollouts.safetensors'}",
        "debug.save_rollouts=null",
        "train.num_steps=2",
        "objective.loss=own_code:loss",
        "objective.loss_args.bound=2.0",
        "objective.advantage=own_code:advantages",
        "objective.advantage_args={scale: 2.0}",
        "objective.ratio=sequence",
        "objective.aggregation=seq_mean_token_sum",
        "objective.importance_sampling={weight: sequence, reject: sequence}",
        "objective.kl={coef: 0.1, where: reward}",
    )
    first, second = digits.read_metrics(tmp_path / "run")[0]
    assert 0 < first["ref_kl"] < second["ref_kl"]
    for line in (first, second):
        assert line["grad_norm"] > 0 and line["num_skipped_steps"] == 0
        assert line["time/reference_s"] > 0
        assert {line[f"pass_{k}/one"] for k in range(1, int(line["num_passes"]) + 1)} == {1.0}
    # At the first step engine and trainer had the same weights.
    assert math.isclose(first["mismatch_weight_mean"], 1.0, abs_tol=1e-3)
    assert first["mismatch_rejected"] == 0


def assert_same_weights(left: Path, right: Path, tolerance: float) -> None:
    from safetensors.torch import load_file

    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst <= tolerance


@pytest.mark.full
def test_rollouts_alone(tmp_path: Path) -> None:
    """`debug.rollout_only`: lines say what was generated and how long it took; no policy."""
    config = digits.write_config(tmp_path, digits.make_model(tmp_path / "model"))
    output = digits.train(config, "debug.rollout_only=true", "parallel.tensor=1")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "num_rollouts" in line]
    assert [line["num_rollouts"] for line in steps] == [128, 256, 384]
    for line in steps:
        assert line["time/generate_s"] > 0 and line["time/reward_s"] >= 0
        assert "loss" not in line
    assert "generate" in output
    assert not (tmp_path / "run/hf").exists()


@pytest.mark.full
def test_bfloat16_engine_and_trainer_agree(tmp_path: Path) -> None:
    """Both round to bf16, at different places: the bound is the issue's."""
    model = digits.make_model(tmp_path / "model", tied=False)
    config = digits.write_config(
        tmp_path, model, model={"dtype": "bfloat16"}, train={"num_steps": 2}
    )
    digits.train(config, "parallel.tensor=1", "parallel.data=2")
    train, _ = digits.read_metrics(tmp_path / "run")
    assert len(train) == 2
    for line in train:
        assert line["logprob_diff_mean"] < 0.02
        assert line["grad_norm"] > 0
        assert line["ppo_kl_first_pass"] == 0.0


@pytest.mark.full
def test_a_predicted_trajectory_trains(tmp_path: Path) -> None:
    """PrePO: 3 passes of K = 5, and what was predicted in the metrics."""
    model = digits.make_model(tmp_path / "model")
    prepo = {"trajectory": "predicted", "num_fast_passes": 5, "alpha": 0.5, "moments": "restore"}
    config = digits.write_config(tmp_path, model, sfpo=prepo)
    digits.train(config)
    train, _ = digits.read_metrics(tmp_path / "run")
    assert [line["num_optimizer_steps"] for line in train] == [6, 12, 18]
    for line in train:
        assert not undeclared(line, (*TRAIN_STEP, *COSTS))
        check_passes(line)
        assert line["num_passes"] == 3 and line["num_skipped_steps"] == 0
        assert all(line[f"pass_{k}/grad_norm"] > 0 for k in (1, 2, 3))
        assert all(math.isfinite(value) for value in line.values())
        assert 1 < line["prediction/q_mean"] < line["prediction/q_max"] <= 3.5
        assert 0 < line["prediction/clipped"] < 1 and 0 < line["prediction/inactive"] < 1
    # The slow correction starts away from the policy that generated, at the first step too.
    assert train[0]["pass_3/ratio_max"] > 1.001


@pytest.mark.full
def test_the_generators_log_probs_train(tmp_path: Path) -> None:
    """`objective.old_logprobs: generator` with a learning rate that hardly moves the ratio: what
    is left in it is the gap between engine and trainer. The second minibatch has the engine's."""
    model = digits.make_model(tmp_path / "model")
    config = digits.write_config(
        tmp_path, model, objective={"old_logprobs": "generator"}, sfpo={"num_fast_passes": 0}
    )
    digits.train(config, "train.optimizer.lr=1e-9")
    train, _ = digits.read_metrics(tmp_path / "run")
    assert [line["num_optimizer_steps"] for line in train] == [2, 4, 6]
    for line in train:
        assert all(math.isfinite(value) for value in line.values())
        assert "time/logprob_s" not in line
        assert line["grad_norm"] > 0 and line["num_skipped_steps"] == 0
        # Not exactly 1, as it would be of log-probs of the trainer's own.
        assert 1e-8 < abs(line["pass_1/ratio_max"] - 1) < 1e-4
        assert abs(line["pass_1/ratio_mean"] - 1) < 1e-4
        assert line["logprob_diff_max"] < 1e-4
