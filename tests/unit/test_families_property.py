"""Any config.json and index: what `check` takes is the model that transformers makes of it, and its
weights load.

Not exercised: a train step, an engine.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made.models import TOKENIZER_JSON
from made.readings import apart, auto_config, ours, theirs
from made.variants import configs, write_weights

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.tree import DataConfig, DataSource, ModelConfig, RolloutConfig, RunConfig
from sfpo_megatron.families.hf_files import HFCheckpoint
from sfpo_megatron.families.shape import UnsupportedModel, model_shape
from sfpo_megatron.families.table import rules_of


def run_of(folder: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=(DataSource(source="reasoning_gym", task="chain_sum", size=100),)),
        rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=8),
    )


def transformers_tensors(config: Any, family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what its model of this configuration is made of."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return dict(apart(found, mixtral=family == "mixtral"))


def verdict(config: dict[str, Any], num_files: int) -> str:
    """One config.json through `check`, its shape and a load; AssertionError where they part."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        (model / "tokenizer.json").write_text(TOKENIZER_JSON)
        try:
            shape = model_shape(config)
        except UnsupportedModel as error:
            assert len(str(error).splitlines()) == 1
            with pytest.raises(ConfigError):
                check_config(run_of(folder), file="run.yaml", on_cpu=False)
            return "refused"
        write_weights(model, shape, num_files)
        if "model_type" in config:  # converters take what has none
            reference = auto_config(model, config)
            said = theirs(reference)
            assert ours(shape, said) == said
        try:
            check_config(run_of(folder), file="run.yaml", for_training=True, on_cpu=False)
        except ConfigError:
            return "refused by another rule"
        checkpoint = HFCheckpoint(model, shape)
        expected = transformers_tensors(reference, shape.family)
        loaded = {}
        for rule in rules_of(shape):
            for name, part in zip(rule.hf, checkpoint.parts(rule), strict=True):
                loaded[name] = tuple(part.shape)
        assert loaded == expected
        return "taken"


def examples(num: int) -> Callable[[], Counter[str]]:
    verdicts: Counter[str] = Counter()

    @settings(
        max_examples=num,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(configs(), st.integers(1, 2))
    def run(config: dict[str, Any], num_files: int) -> None:
        verdicts[verdict(config, num_files)] += 1

    def counted() -> Counter[str]:
        run()
        return verdicts

    return counted


@pytest.mark.parametrize("num", [40, pytest.param(500, marks=pytest.mark.full)])
def test_what_check_takes_is_what_transformers_takes_and_loads(num: int) -> None:
    verdicts = examples(num)()
    assert verdicts["taken"] >= num / 5 and verdicts["refused"] >= num / 10
