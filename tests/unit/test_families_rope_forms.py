"""Rotary embeddings in every form that a config.json has them in, against the installed
transformers; and how long a sequence they allow.

Not exercised: the frequencies (test_convert.py), Megatron's model (tests/dist/test_logits.py).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from made.readings import FULL, same, same_or_refused
from made.rope_forms import BROKEN, DEFAULT, DICTS, LINEAR, LLAMA3, YARN

from sfpo_megatron.families.shape import UnsupportedModel, model_shape

LATENT_REFUSES = ("linear", "llama3")


def bare(family: str) -> dict[str, Any]:
    return {key: value for key, value in FULL[family].items() if key != "rope_theta"}


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("theta", [None, 600000.0], ids=["no_theta", "theta"])
def test_each_form_is_read_as_transformers_reads_it(
    tmp_path: Path, family: str, theta: float | None
) -> None:
    """One key in every form, the other, none; with rope_theta beside them or not. Both keys in
    every pair of forms, for one family."""
    around = bare(family) | ({} if theta is None else {"rope_theta": theta})
    if family == "qwen3" and theta is None:
        pairs = list(product(DICTS, DICTS))
    else:  # the two keys meet in one place for all families
        pairs = [(name, "null") for name in DICTS] + [("null", name) for name in DICTS]
    taken = 0
    for five, four in pairs:
        config = around | {"rope_parameters": DICTS[five], "rope_scaling": DICTS[four]}
        taken += same_or_refused(tmp_path, config)
    assert same_or_refused(tmp_path, around)
    scaled = ("scaled_yarn",) if family != "deepseek_v3" else LATENT_REFUSES
    refused = [n for n, form in DICTS.items() if any(word in n for word in scaled)]
    wrong = sum(four in refused or (not DICTS[four] and five in refused) for five, four in pairs)
    assert taken == len(pairs) - wrong


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("form", BROKEN)
def test_what_is_refused(family: str, key: str, form: str) -> None:
    """Also where the other key has something that could be read."""
    other = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[key]
    beside = [None, {}] if key == "rope_parameters" else [None, {}, DEFAULT, YARN]
    for value in beside:
        with pytest.raises(UnsupportedModel) as caught:
            model_shape(bare(family) | {key: BROKEN[form], other: value})
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("theta", ["1e4", -1.0, True, None, 0, float("nan"), [1e4]])
def test_rope_theta_that_is_no_number(theta: object) -> None:
    with pytest.raises(UnsupportedModel, match="rope_theta"):
        model_shape(FULL["llama"] | {"rope_theta": theta})


def test_the_older_key_wins_and_brings_its_own_theta(tmp_path: Path) -> None:
    """The handed input: {default} under the newer key, yarn under the older one."""
    config = bare("qwen2") | {"rope_parameters": DEFAULT, "rope_scaling": YARN}
    same(tmp_path, config)
    shape = model_shape(config)
    assert shape.rope_scaling is not None and shape.rope_scaling.kind == "yarn"
    assert shape.rope_base == 10000.0  # of Qwen2; not the newer key's 2e4


LENGTHS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 64),
    "default": ({"rope_parameters": DEFAULT}, 64),
    "linear": ({"rope_scaling": LINEAR}, 256),
    "yarn": ({"rope_scaling": YARN}, 256),
    "yarn_without_original": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    "yarn_stretched_already": ({"rope_scaling": YARN, "max_position_embeddings": 256}, 256),
    "yarn_stretched_further": ({"rope_scaling": YARN, "max_position_embeddings": 300}, 300),
    "yarn_in_part": ({"rope_scaling": {**YARN, "original_max_position_embeddings": 16}}, 64),
    "llama3": ({"rope_scaling": LLAMA3}, 256),
    "llama3_stretched_already": ({"rope_scaling": LLAMA3, "max_position_embeddings": 512}, 512),
    "odd": ({"rope_scaling": {**LINEAR, "factor": 1.55}}, 99),
    "other_limit": ({"max_seq_len": 40}, 40),
    "other_limit_stretched": ({"seq_length": 40, "rope_scaling": LINEAR}, 160),
    "other_limit_above": ({"model_max_length": 4096}, 64),
}


@pytest.mark.parametrize("form", LENGTHS)
def test_how_long_a_sequence_may_be(form: str) -> None:
    change, expected = LENGTHS[form]
    shape = model_shape(bare("llama") | {"max_position_embeddings": 64} | change)
    assert shape.max_context == expected
