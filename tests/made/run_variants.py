"""Any run.yaml that somebody may have, as a hypothesis strategy: a tiny run whose keys have other
values, right ones and wrong ones, in YAML with its traps. Also the files that it names."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import shutil
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import digits
import yaml
from hypothesis import strategies as st

from sfpo_megatron.config.data import DataSource
from sfpo_megatron.config.tree import RunConfig

NUM_PROMPTS, GROUP_SIZE = 4, 2
SUMS = {"source": "jsonl", "path": "sums.jsonl"}
HELD_OUT = {"source": "jsonl", "path": "held_out.jsonl"}
MADE = {"source": "reasoning_gym", "task": "chain_sum", "size": 8}
SWAPPED = {"prompt": "answer", "answer": "prompt"}
SAVED = {"train_only": "saved.safetensors"}
BASE: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "train": {"num_steps": 1, "prompts_per_step": NUM_PROMPTS, "group_size": GROUP_SIZE},
    "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 8},
    "data": {"train": [SUMS], "eval": [HELD_OUT]},
    "reward": {"function": "last_number"},
    "sft": {"num_steps": 1, "examples_per_step": 4},
    "checkpoint": {"every": 0},
}
"""A run with engines; `debug: SAVED` beside it is one that trains on saved rollouts."""


def write_files(folder: Path, model: Path) -> None:
    """What run.yaml in `folder` may name: a copy of `model`, rows, two train steps of rollouts."""
    shutil.copytree(model, folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "9+0=", "answer": "9"}) + "\n")
    sizes = {"num_prompts": NUM_PROMPTS, "group_size": GROUP_SIZE}
    digits.save_rollouts(folder / SAVED["train_only"], num_steps=2, **sizes)


# ---- values ------------------------------------------------------------------------------------


class Raw(str):
    """What stands in the YAML as it is."""


TRAPS = [
    *("yes", "no", "on", "off", "~", "null", "010", "08", "1:30", "1e-6", "1e3", "1_000", "0x10"),
    *(".inf", "-.inf", ".nan", "2026-11-29", "<<", "*a", "@a", "'a", "[", "{}", "[1, a]", "{a: 1}"),
    *("", "# none", "'1'", '"1"', "!!int 3", "&a 1", "1 # one", "- 1", "a: b", "!x 1", "|"),
]
NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**64, 0.5, 1.0, -0.5, 1e-6, 1e-300, 1e300]
TEXTS = ["", " ", "1", "0.5", "true", "auto", "no such thing", "ä", "a\nb", "x" * 300, "$NO", "$$"]
ODD = [None, True, False, *NUMBERS, *TEXTS, [], [1], ["a"], {}, {"a": 1}, *map(Raw, TRAPS)]
PATHS = ["a/b", ".", "..", "./~", "~", "~/a", "model", "model/a", "run.yaml", "/dev/null/a"]

FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
UNSHARDED = {"use_distributed_optimizer": False}
GOOD: dict[str, list[Any]] = {
    "seed": [0, 1, 2**32 - 1],
    "output_dir": ["run", "a/b", "ä ö", Raw("'7'"), "~/a", "$$"],
    "model.path": ["model", "./model", "$HOME/../model"],
    **{f"parallel.{name}": [1] for name in ("tensor", "pipeline", "context", "expert_tensor")},
    "parallel": [{}, {"data": 1}, {"data": None}],
    "parallel.data": [1, None],
    "parallel.expert": [1],
    "parallel.sequence": [False],
    "parallel.virtual_pipeline": [None],
    "megatron": [{"ddp": UNSHARDED, "optimizer": {"optimizer": "sgd"}}],
    "megatron.transformer": [
        FULL | {"recompute_method": "uniform", "recompute_num_layers": 1},
        FULL | {"recompute_method": "block", "recompute_num_layers": 2},
        *(SELECTIVE, SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]}),
        *({"bias_activation_fusion": False}, {"masked_softmax_fusion": False}, {}),
        *({"fp32_residual_connection": True}, {"attention_softmax_in_fp32": True}),
    ],
    "megatron.ddp": [
        *({"overlap_grad_reduce": True}, {"bucket_size": 1000}, {"average_in_collective": True}),
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
        *({"grad_reduce_in_fp32": False}, UNSHARDED, {"check_for_nan_in_grad": True}, {}),
        {"num_distributed_optimizer_instances": 1},
    ],
    "megatron.optimizer": [
        *({"loss_scale": 1024.0}, {"initial_loss_scale": 4096.0}, {"log_num_zeros_in_grad": True}),
        *({"optimizer_cpu_offload": True, "pin_cpu_grads": False}, {"loss_scale": None}, {}),
        *({"use_precision_aware_optimizer": True}, {"optimizer": "sgd"}, {"hysteresis": 1}),
        {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"},
        *({"decoupled_weight_decay": False}, {"loss_scale_window": 2.0}),
    ],
    "train.num_steps": [1, 2],
    "train.num_epochs": [1, 2, None],
    "train.prompts_per_step": [4, 2],
    "train.group_size": [2, 4],
    "train.minibatches_per_step": [1, 2, 4],
    "train.microbatch_size": [None, 1, 3, 100],
    "train.max_tokens_per_microbatch": [24, 25, 8192],
    "train.logprob_chunk_tokens": [1, 7, 10**6],
    "train.control_timeout_s": [60, 1800.0, Raw("6e2")],
    "train.optimizer.lr": [0, 1e-3, Raw("1e-6"), "1e-6", 10],
    "train.optimizer.lr_warmup_steps": [0, 1],
    "train.optimizer.lr_floor": [0.0, 1e-7],
    "train.optimizer.lr_decay_steps": [None, 1],
    "train.optimizer.betas": [[0.9, 0.95], [0, 0], [0.0, 0.999999]],
    "train.optimizer.eps": [1e-8, 1e-300, 1],
    "train.optimizer.clip_grad": [0, 1, 0.1, 1e-300],
    "sfpo.num_fast_passes": [0, 1, 2, 3],
    "sfpo.alpha": [0, 0.5, 1],
    "sfpo.stop_step": [None, 0, 1, 2],
    "sfpo": [{"trajectory": "predicted", "moments": "restore"}, {"snapshot": "host"}],
    "objective": [{"loss": "cispo", "advantage": "rloo"}, {"ratio": "sequence"}],
    "objective.advantage": ["grpo", "rloo", "reinforce_pp"],
    "objective.loss": ["ppo_clip", "cispo", "no_clip"],
    "objective.dual_clip": [None, 1, 3.0],
    "objective.overlong.buffer_tokens": [0, 4, 8],
    "rollout.num_engines": [1, 2],
    "rollout.tensor_parallel": [1],
    "rollout.environment": ["single_turn", "math_tool"],
    "rollout.environment_args": [{}],
    "rollout.temperature": [1.0, 0.7, 2],
    "rollout.max_prompt_tokens": [16, 8, 100],
    "rollout.max_response_tokens": [8, 9, 100],
    "rollout.oversample": [1.0, 1.5],
    "rollout.drop_groups": [[], ["zero_variance"], ["truncated", "zero_variance"]],
    "rollout.engine_args": [{"max_num_seqs": 4}, {"enforce_eager": True}, {"block_size": 32}, {}],
    "refit.bucket_bytes": [4096, 1 << 20],
    "data": [{"train": [SUMS]}, {"train": [SUMS, MADE | {"weight": 0.5}], "eval": []}],
    "data.train.0": [SUMS, MADE, SUMS | {"size": 8}, SUMS | {"reward": "math"}],
    "data.train.0.path": ["sums.jsonl", "./sums.jsonl", "s*.jsonl"],
    "data.train.0.size": [None, 8, 100],
    "data.train.0.reward": ["last_number", "math", [{"name": "math"}, {"name": "format"}]],
    "data.train.0.columns": [{}, SWAPPED],
    "data.train.0.source": ["jsonl"],
    "data.eval": [[], [HELD_OUT], [HELD_OUT, HELD_OUT]],
    "data.system_prompt": ["", "1"],
    "data.prompt_prefix": ["", "1+"],
    "data.prompt_suffix": ["", "="],
    "data.chat_template": [False],
    "data.chat_template_args": [{}],
    "reward": [{"function": [{"name": "last_number"}, {"name": "format", "weight": 0.1}]}],
    "reward.function": ["last_number", "math", "exact_match", "math_boxed", "format"],
    "reward.batched": [False],
    "reward.http.url": [None, "http://localhost:1/a"],
    "eval": [{"every": 1, "stop_at": 0.5}, {"n": 2, "temperature": 0}],
    "eval.max_response_tokens": [None, 4, 32],
    "sft": [{"num_steps": 1, "eval_every": 1, "holdout": 0.5}, {"num_epochs": 1}],
    "sft.num_steps": [1, 2],
    "sft.num_epochs": [None],
    "sft.examples_per_step": [4, 100],
    "sft.max_tokens": [None, 32],
    "sft.lr_warmup_steps": [None, 0, 1],
    "checkpoint": [{"every": 1}, {"every": 1, "format": "megatron_lm"}, {"every": 2}],
    "checkpoint.resume": ["auto", "never"],
    "tracking.sinks": [["jsonl"], [], ["console", "jsonl"]],
    "tracking.run_name": [None, "a", "ä/b"],
    "tracking.samples": [{"every": 1}],
    "trace.steps": [[], [1], [1, 2]],
    "trace": [{"steps": [1], "torch_profiler": True}],
    "debug": [{}, SAVED],
    "debug.save_rollouts": [None, "a/kept.safetensors"],
    "debug.train_only": [SAVED["train_only"], None],
}
"""Key, of a section too -> values that are right by themselves."""


def _leaves(cls: type, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{above}{name}.")
        else:
            yield f"{above}{name}", hint


@cache
def keys() -> dict[str, Any]:
    """Every key that a value may stand at -> the annotation of its field, None for a section."""
    found = {key: hint for key, hint in _leaves(RunConfig) if key != "data.train"}
    return dict.fromkeys(GOOD) | found | dict(_leaves(DataSource, "data.train.0."))


def _right(key: str, hint: Any) -> list[Any]:
    """Values that are right by themselves."""
    if key in GOOD:
        return GOOD[key]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [*_right("", typing.get_args(hint)[0]), None]
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    of_type: dict[Any, list[Any]] = {bool: [True, False], int: [1, 2, 10], str: ["a"]}
    return of_type.get(hint, [0.5, 1.0, 1, Raw("1e-1"), 2.5] if hint is float else [])


def value(key: str, seed: int) -> Any:
    """For a key, mostly one that is right by itself."""
    chance, right = random.Random(seed), _right(key, keys()[key])
    if right and chance.random() < 0.85:
        return chance.choice(right)
    return chance.choice([*ODD, *PATHS] if "path" in key or keys()[key] is str else ODD)


# ---- a config ----------------------------------------------------------------------------------

Changes = Iterable[tuple[str, int]]
ODDITIES = ("twice", "ends", "comments", "merge", "tab", "flow", "alias")


def _set(tree: Any, key: str, found: Any) -> None:
    """Put a value at the dotted key, unless an earlier change has put something else above it."""
    name, _, below = key.partition(".")
    place: Any = int(name) if name.isdigit() else name
    if isinstance(tree, dict) or (isinstance(tree, list) and place in range(len(tree))):
        if not below:
            tree[place] = found
        elif isinstance(tree, list) or tree.setdefault(place, {}) is not None:
            _set(tree[place], below, found)


def _written(tree: dict[str, Any], *, flow: bool) -> str:
    """YAML in which every Raw stands as it is."""
    raw: list[str] = []

    def held(item: Any) -> Any:
        if isinstance(item, Raw):
            raw.append(item)
            return f"RAW{len(raw) - 1}RAW"
        if isinstance(item, dict):
            return {name: held(inner) for name, inner in item.items()}
        return [held(inner) for inner in item] if isinstance(item, list) else item

    style = {"sort_keys": False, "allow_unicode": True, "default_flow_style": flow}
    text: str = yaml.safe_dump(held(tree), **style)
    return re.sub(r"RAW(\d+)RAW", lambda match: raw[int(match[1])], text)


def run_yaml(changes: Changes, *, oddity: str = "none", saved: bool = False) -> str:
    """The text of a run.yaml with other values at these keys, each chosen by its seed. `saved`: it
    trains on saved rollouts."""
    tree = copy.deepcopy(BASE | ({"debug": SAVED} if saved else {}))
    for key, seed in changes:
        _set(tree, key, copy.deepcopy(value(key, seed)))
    lines = _written(tree, flow=oddity == "flow").splitlines(keepends=True)
    match oddity:
        case "twice":
            lines.append(lines[0])
        case "tab":
            lines[1] = "\t" + lines[1]
        case "comments":
            lines = [line.replace("\n", " # so\n") for line in lines]
        case "merge":
            lines.append("trace: {<<: {steps: [2], torch_profiler: true}, steps: [1]}\n")
        case "alias":
            lines += ["refit: &a {timeout_s: 60}\n", "eval: *a\n"]
        case "ends":
            lines = [line.replace("\n", "\r\n") for line in lines]
    return "".join(lines)


def key_changes() -> st.SearchStrategy[list[tuple[str, int]]]:
    """One to five keys, and a seed for the value of each."""
    change = st.tuples(st.sampled_from(sorted(keys())), st.integers(0, 2**32))
    return st.lists(change, min_size=1, max_size=5)


def variants() -> st.SearchStrategy[str]:
    """Texts of run.yaml."""
    oddities = st.sampled_from([*["none"] * 28, *ODDITIES])
    return st.builds(run_yaml, key_changes(), oddity=oddities, saved=st.booleans())
