"""Names that peers use, and ours in another section, lead to our keys wherever they stand."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from sfpo_megatron.config import reference
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.config.names import _AMBIGUOUS, _IN_ROLLOUT, _IN_SOURCE, _NOTHING, PEERS

BASE = """\
output_dir: r
model: {path: m}
data: {train: [{source: reasoning_gym, task: chain_sum, size: 100}]}
"""
KEYS = {key.name: key for section in reference.sections() for key in section.keys}
SUGGESTED = {  # an override -> the key that is meant
    "lr=1": "train.optimizer.lr",
    "learning_rate=1": "train.optimizer.lr",
    "train.lr=1": "train.optimizer.lr",
    "train.learning-rate=1": "train.optimizer.lr",
    "n=8": "train.group_size",
    "rollout.n=8": "train.group_size",
    "num_generations=8": "train.group_size",
    "rollout.group_size=8": "train.group_size",
    "beta=0.1": "objective.kl.coef",
    "kl_coef=0.1": "objective.kl.coef",
    "objective.kl_coef=0.1": "objective.kl.coef",
    "max_new_tokens=8": "rollout.max_response_tokens",
    "rollout.max_response_length=8": "rollout.max_response_tokens",
    "data.max_prompt_length=8": "rollout.max_prompt_tokens",
    "micro_batch_size=1": "train.microbatch_size",
    "train.per_device_train_batch_size=1": "train.microbatch_size",
    "data.train_batch_size=8": "train.prompts_per_step",
    "ppo_mini_batch_size=8": "train.minibatches_per_step",
    "train.epochs=3": "train.num_epochs",
    "train.batch_size=8": "train.prompts_per_step or train.minibatches_per_step",
    "train.max_epochs=1": "train.num_epochs or sfpo.num_fast_passes",
    "rollout.batch_size=8": "train.prompts_per_step",
    "rollout.n_samples_per_prompt=8": "train.group_size",
    "megatron.use_distributed_optimizer=true": "megatron.ddp.use_distributed_optimizer",
    "trainer.total_epochs=3": "train.num_epochs",
    "train.max_steps=3": "train.num_steps",
    "lr_scheduler_type=cosine": "train.optimizer.lr_schedule",
    "train.min_lr=1e-7": "train.optimizer.lr_floor",
    "save_interval=3": "checkpoint.every",
    "checkpoint.save_steps=3": "checkpoint.every",
    "wandb=true": "tracking.sinks",
    "tracking.wandb_project=x": "tracking.sinks",
    "tensor_parallel_size=2": "parallel.tensor",
    "parallel.tensor_model_parallel_size=2": "parallel.tensor",
    "rollout.tensor_parallel_size=2": "rollout.tensor_parallel",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2": "rollout.tensor_parallel",
    "actor_rollout_ref.actor.optim.lr=1e-6": "train.optimizer.lr",
    "actor_rollout_ref.rollout.n=8": "train.group_size",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2": "parallel.tensor",
    "algorithm.kl_ctrl.kl_coef=1": "objective.kl.coef",
    "algorithm.adv_estimator=grpo": "objective.advantage",
    "policy.max_grad_norm=1": "train.optimizer.clip_grad",
    "alpha=0.5": "sfpo.alpha",
    "actor_rollout_ref.actor.use_rollout_log_probs=true": "objective.old_logprobs",
    "sfpo.sfpo_inner_steps=3": "sfpo.num_fast_passes",
    "clip_ratio_high=0.28": "objective.clip_high",
    "actor_rollout_ref.rollout.val_kwargs.temperature=0.6": "eval.temperature",
    "eval_temperature=0.6": "eval.temperature",
    "rollout.val_kwargs.top_p=0.9": "eval.top_p",
    "eval_max_response_len=8": "eval.max_response_tokens",
    "data.filter_overlong_prompts=true": "data.on_bad_row",
    "rollout_top_p=0.9": "rollout.top_p",
    "train.top_p=0.9": "rollout.top_p or eval.top_p",
    "async_steps=1": "rollout.async_steps",
    "enforce_eager=true": "rollout.engine_args.enforce_eager",
}


def refusal(tmp_path: Path, text: str, *overrides: str) -> ConfigError:
    (tmp_path / "run.yaml").write_text(BASE + text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", list(overrides))
    return caught.value


@pytest.mark.parametrize("override", SUGGESTED)
def test_did_you_mean(tmp_path: Path, override: str) -> None:
    error = refusal(tmp_path, "", override)
    assert error.found == "an unknown key" and error.file == "command line"
    assert error.fix == f"did you mean {SUGGESTED[override]}?"


def test_a_section_of_a_peer_is_told_by_its_keys(tmp_path: Path) -> None:
    section = "actor_rollout_ref: {actor: {optim: {lr: 1}}, rollout: {n: 8, top_k: 1}}"
    error = refusal(tmp_path, section)
    assert error.key == "actor_rollout_ref" and error.line == 4
    assert error.fix == "did you mean train.optimizer.lr or train.group_size?"


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("trainer.nnodes=2", "nodes are those of the job"),
        ("cluster.num_nodes=2", "nodes are those of the job"),
        ("trainer.val_before_train=true", "an evaluation comes before the first step too"),
        ("trainer.critic_warmup=0", "there is no critic"),
        ("trainer.balance_batch=true", "ranks get equal work"),
    ],
)
def test_what_a_section_of_a_peer_alone_has_and_we_do_not(
    tmp_path: Path, override: str, why: str
) -> None:
    assert refusal(tmp_path, "", override).fix.startswith(f"remove it: {why}")
    error = refusal(tmp_path, "trainer: {nnodes: 1, n_gpus_per_node: 8}")
    assert error.fix == "did you mean parallel.data?"
    assert refusal(tmp_path, "trian: {num_steps: 3, nnodes: 1}").fix == "did you mean train?"


def test_a_dotted_key_of_a_file(tmp_path: Path) -> None:
    error = refusal(tmp_path, "train.num_steps: 3")
    assert "train.num_steps" in error.fix and error.line == 4


def test_a_misspelling_goes_before_other_sections(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train: {num_step: 1}").fix == "did you mean num_steps?"
    assert refusal(tmp_path, "zzz: 1").fix == "remove it or correct its name"


def test_every_suggestion_is_a_key() -> None:
    """And no key of ours at the top level is taken for a peer's."""
    targets = {*PEERS.values(), *_IN_ROLLOUT.values(), *chain.from_iterable(_AMBIGUOUS.values())}
    targets |= {f"data.train.N.{name}" for name in _IN_SOURCE.values()}
    sections = {name.rpartition(".")[0] for name in KEYS}
    passed_on = ("rollout.engine_args.", "megatron.")
    for target in targets:
        assert target in KEYS or target in sections or target.startswith(passed_on), target
    last_parts = {name.rpartition(".")[2] for name in KEYS}
    assert not {name for name in KEYS if "." not in name} & set(PEERS)
    assert not last_parts & set(_NOTHING)


SOURCES = {  # what stands at data.train, or in its first entry -> the fix
    "data.train=openai/gsm8k": "write a list: [{source: hf, path: openai/gsm8k}]",
    "data.train=[rows/a.jsonl.gz]": "write {source: jsonl, path: rows/a.jsonl.gz}",
    "data.train=[rows/*.parquet]": "write {source: parquet, path: rows/*.parquet}",
    "data.train={dataset_name: x}": "write a list: [{...}]",
    "data.train.0.dataset_name=x": "did you mean path?",
    "data.train.0.name=main": "did you mean config?",
    "data.train.0.input_key=question": "did you mean columns?",
    "data.train.0.source=huggingface": "did you mean hf?",
    "data.prompt_key=question": "did you mean data.train?",
    "eval.files=[a.jsonl]": "did you mean data.eval?",
}


@pytest.mark.parametrize("override", SOURCES)
def test_words_for_data_sets(tmp_path: Path, override: str) -> None:
    assert refusal(tmp_path, "", override).fix == SOURCES[override]


VALUES = {
    "model=Qwen/Qwen2.5-7B": "write {path: Qwen/Qwen2.5-7B}",
    "parallel=8": "write {data: 8}",
    "reward=math": "write {function: math}",
    "objective.kl=0.01": "write {coef: 0.01}",
    "objective.kl.estimator=low_var_kl": "did you mean k3?",
    "objective.advantage=reinforce++": "did you mean reinforce_pp?",
    "reward.function=gsm8k": "did you mean math?",
    "reward.function=nothing_like_it": "choose one of these, or name your own",
    "refit.transport=NCCL": "did you mean nccl?",
    "tracking.sinks=wandb": "write a list: [wandb]",
    "rollout.top_k=50": "remove it: responses are of the whole distribution, as the trainer's "
    "log-probs",
    "num-layers=24": "remove it: the model's config.json says it",
    "logging_steps=1": "remove it: every train step is logged",
    "lora_rank=8": "remove it: all weights are trained",
    "deepspeed=ds.json": "remove it: the trainer is Megatron-Core",
}


@pytest.mark.parametrize("override", VALUES)
def test_values_and_names_of_peers(tmp_path: Path, override: str) -> None:
    assert refusal(tmp_path, "", override).fix == VALUES[override]
