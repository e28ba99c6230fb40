"""`eval`'s options: which config they make, which models they name, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.cli import main, parse
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.evaluation.models import find_model
from sfpo_megatron.evaluation.records import EvaluationError
from sfpo_megatron.evaluation.request import BENCHMARKS, BOXED, Request, request_of

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def make_model(path: Path, *, template: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SHAPE))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "x"} if template else {})
    )
    return path


def request(*arguments: str) -> Request:
    return request_of(parse(["eval", *arguments]))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in BENCHMARKS:
        (tmp_path / f"data/{name}.parquet").touch()
    return make_model(tmp_path / "m")


def test_options_alone_make_a_config(model: Path) -> None:
    options = "--n 4 --temperature 0.7 --top-p 0.9 --max-tokens 100 --data math500,gsm8k,x.jsonl"
    found = request("--model", "m", *options.split(), "rollout.num_engines=3")
    config = found.config
    assert [m.hf for m in found.models] == [Path("m")] and config.model.path == "m"
    assert (config.eval.n, config.eval.temperature, config.eval.top_p) == (4, 0.7, 0.9)
    assert config.eval_response_tokens == config.rollout.max_response_tokens == 100
    assert config.engine_tokens == 512  # all that the model has positions for
    assert [(s.source, s.path) for s in config.data.eval] == [
        ("parquet", "data/math500.parquet"),
        ("parquet", "data/gsm8k.parquet"),
        ("jsonl", "x.jsonl"),
    ]
    assert config.reward.function == "math" and config.data.prompt_suffix == BOXED
    assert config.rollout.num_engines == 3 and config.output_dir == "runs/eval"
    assert not config.data.chat_template


def test_a_template_is_used_where_the_tokenizer_has_one(model: Path) -> None:
    make_model(model / "chat", template=True)
    assert request("--model", "m/chat", "--data", "gsm8k").config.data.chat_template
    (model / "chat_template.jinja").touch()
    assert request("--model", "m", "--data", "gsm8k").config.data.chat_template
    assert not request(
        "--model", "m", "--data", "gsm8k", "data.chat_template=false"
    ).config.data.chat_template


def test_options_go_before_a_file_and_overrides_before_both(model: Path) -> None:
    Path("c.yaml").write_text(
        "output_dir: r\nmodel: {path: other}\neval: {n: 2, temperature: 0.1}\n"
        "rollout: {max_response_tokens: 50}\nparallel: {tensor: 4}\n"
        "data:\n  train: [{source: jsonl, path: t}]\n  eval: [{source: jsonl, path: e}]\n"
    )
    config = request("c.yaml", "--model", "m", "--n", "8", "eval.temperature=0.3").config
    assert (config.eval.n, config.eval.temperature) == (8, 0.3)
    assert (config.model.path, config.output_dir) == ("m", "r")
    assert [source.path for source in config.data.eval] == ["e"]
    assert config.parallel.tensor == 1  # no trainer
    longer = request("c.yaml", "--model", "m", "--max-tokens", "200").config
    assert longer.eval_response_tokens == 200 and longer.rollout.max_response_tokens == 50
    assert longer.engine_tokens == 64 + 200


def test_several_models_are_named_apart(model: Path) -> None:
    make_model(model / "a/x")
    make_model(model / "b/x")
    found = request("--model", "m/a/x", "--model", "m/b/x", "--data", "gsm_symbolic")
    first, second = found.models
    assert first.slug != second.slug
    assert found.config.data.eval[0].task == "gsm_symbolic"
    assert found.config.reward.function == "last_number"


def test_benchmarks_of_different_rewards_go_together(model: Path) -> None:
    """Each is scored by its own; the suffix is one, and `--reward` is for all."""
    both = ("--model", "m", "--data", "math500,gsm_symbolic")
    config = request(*both).config
    assert config.reward.function == "math" and config.data.prompt_suffix == BOXED
    assert [source.reward for source in config.data.eval] == [None, "last_number"]
    turned = request("--model", "m", "--data", "gsm_symbolic,x.jsonl,math500").config
    assert turned.reward.function == "last_number" and turned.data.prompt_suffix == BOXED
    assert [source.reward for source in turned.data.eval] == [None, None, "math"]
    one = request(*both, "--reward", "exact_match").config
    assert one.reward.function == "exact_match"
    assert [source.reward for source in one.data.eval] == [None, None]
    summed = request(*both, "--reward", "[{name: math}, {name: format, weight: 0.1}]").config
    assert [(s.name, s.weight) for s in summed.reward.summands(None)] == [
        ("math", 1.0),
        ("format", 0.1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no CONFIG, no --model"),
        ("--model m", "--data math500"),
        ("--model nowhere --data gsm8k", "found nothing there"),
        ("--model data --data gsm8k", "neither config.json nor a checkpoint"),
        ("--model m --data math5000", "found 'math5000'"),
        ("--model m --data ,", "--data: found ','"),
        ("--model m --data gsm8k --data-dir none", "prepare_data.py"),
        ("--model m --data gsm8k --max-tokens 512", r"positions \(512\)"),
        ("--model m --data gsm8k --max-tokens 0", "eval.max_response_tokens"),
        ("--model m --data gsm8k --n 0", "eval.n"),
        ("--model m --data gsm8k --top-p 1.5", "eval.top_p"),
        ("--model m --data gsm8k --reward maths", "reward.function"),
        ("--model m --data gsm8k --reward [math", "--reward: found"),
        ("--model m --data gsm8k rollout.num_engine=2", "num_engines"),
    ],
)
def test_what_cannot_be_is_refused(model: Path, arguments: str, message: str) -> None:
    with pytest.raises((ConfigError, EvaluationError), match=message):
        request(*arguments.split())


def test_packed_files_are_files(model: Path) -> None:
    found = request("--model", "m", "--data", "a.jsonl.gz,b.ndjson,c.parquet").config.data.eval
    assert [(source.source, source.path) for source in found] == [
        ("jsonl", "a.jsonl.gz"),
        ("jsonl", "b.ndjson"),
        ("parquet", "c.parquet"),
    ]


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff{}"])
def test_a_tokenizer_config_that_is_none_is_named(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"m/tokenizer_config\.json"):
        request("--model", "m", "--data", "gsm8k")


def test_the_command_says_it_in_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "nowhere", "--data", "gsm8k"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: nowhere: found nothing") and err.count("\n") == 1


# ---- which weights of a run --------------------------------------------------------------------


def make_run(path: Path, *steps: int, best: int | None = None, hf: bool = False) -> None:
    """A run's folder as far as finding its weights goes."""
    base = make_model(path.with_name(f"{path.name}-base"))
    path.mkdir()
    (path / "config.yaml").write_text(json.dumps({"model": {"path": str(base)}}))
    for step in steps:
        directory = path / f"checkpoints/step_{step:07d}"
        directory.mkdir(parents=True)
        for name in (".metadata", "metadata.json", "run_state.json", "manifest.json"):
            (directory / name).write_text("{}")
        (path / "checkpoints/latest").write_text(directory.name)
    if best is not None:
        (path / "checkpoints/best").write_text(f"step_{best:07d}")
    if hf:
        make_model(path / "hf")


def touch(path: Path, seconds: float) -> None:
    import os

    os.utime(path, (seconds, seconds))


def test_the_last_and_the_best_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 5, 10, best=5)
    last, best = find_model(str(run), "last"), find_model(str(run), "best")
    assert last.checkpoint == run / "checkpoints/step_0000010"
    assert best.checkpoint == run / "checkpoints/step_0000005"
    assert last.hf == tmp_path / "run-base" and last.slug != best.slug
    assert find_model(str(run / "checkpoints"), "last").checkpoint == last.checkpoint
    assert find_model(str(best.checkpoint), "last").checkpoint == best.checkpoint


def test_hf_is_the_last_of_a_run_that_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 5, hf=True)
    touch(run / "hf/config.json", 2000)
    touch(run / "checkpoints/step_0000005/manifest.json", 1000)
    assert find_model(str(run), "last").hf == run / "hf"
    touch(run / "checkpoints/step_0000005/manifest.json", 3000)  # it went on since
    assert find_model(str(run), "last").checkpoint == run / "checkpoints/step_0000005"


def test_a_run_without_a_best_checkpoint_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5)
    for removed in (None, "step_0000003"):  # by retention, without checkpoint.keep_best
        if removed is not None:
            (tmp_path / "run/checkpoints/best").write_text(f"{removed}\n")
        with pytest.raises(EvaluationError, match=r"that checkpoints/best names.*keep_best"):
            find_model(str(tmp_path / "run"), "best")


def test_the_fingerprint_changes_with_the_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"1")
    before: Any = find_model(str(folder), "last").fingerprint()
    (folder / "notes.txt").write_text("x")
    assert find_model(str(folder), "last").fingerprint() == before
    (folder / "model.safetensors").write_bytes(b"12")
    assert find_model(str(folder), "last").fingerprint() != before
