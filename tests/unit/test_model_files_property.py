"""Directories that went wrong at random: whatever `check` accepts loads, as transformers loads it.

Not exercised here: the training step after the load, and values that changed within a file.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made.model_files import INDEX, SHARDS, random_tensors, write_config, write_shards, write_single
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.rules.model import read_model
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.families.hf_files import HFCheckpoint
from sfpo_megatron.families.operations import merge
from sfpo_megatron.families.safetensors_header import ModelFilesError, read_header
from sfpo_megatron.families.shape import model_shape, read_hf_config
from sfpo_megatron.families.table import rules_of
from sfpo_megatron.resharding.transports.tensor_names import read_checkpoint_shapes

TENSORS = random_tensors()
OTHERS = random_tensors(1)
NAMES = (*SHARDS, "model.safetensors", INDEX)
BESIDE = ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
Step = Callable[[Path, random.Random], None]


def there(model: Path, chance: random.Random) -> Path:
    """One of the files; one that is not there, if none is."""
    found = sorted(
        path for path in model.iterdir() if path.name not in ("config.json", "tokenizer.json")
    )
    return chance.choice(found) if found else model / "none.safetensors"


def missing(model: Path, chance: random.Random) -> None:
    there(model, chance).unlink(missing_ok=True)


def renamed(model: Path, chance: random.Random) -> None:
    file, name = (
        there(model, chance),
        chance.choice((*NAMES, "part.safetensors", "b.safetensors.bak")),
    )
    if file.exists():
        file.rename(model / name)


def doubled(model: Path, chance: random.Random) -> None:
    file, name = there(model, chance), chance.choice((*NAMES, "copy.safetensors"))
    if file.exists():
        (model / name).write_bytes(file.read_bytes())


def truncated(model: Path, chance: random.Random) -> None:
    file = there(model, chance)
    if file.exists():
        data = file.read_bytes()
        file.write_bytes(data[: chance.randrange(len(data) + 1)])


def lengthened(model: Path, chance: random.Random) -> None:
    file = there(model, chance)
    if file.exists():
        file.write_bytes(file.read_bytes() + bytes(chance.randrange(9)))


def header_changed(model: Path, chance: random.Random) -> None:
    file = there(model, chance)
    if file.exists() and (data := bytearray(file.read_bytes())):
        place = chance.randrange(min(len(data), 1500))
        data[place] = chance.choice(b'0123456789{}[]":,FB \xff\0')
        file.write_bytes(data)


def another_index(model: Path, chance: random.Random) -> None:
    names = list(TENSORS)
    chance.shuffle(names)
    names = names[: chance.choice((len(names), len(names) - 1))]
    files = chance.choice((SHARDS, ("model.safetensors",), (*SHARDS, "x.safetensors")))
    weight_map = {name: chance.choice(files) for name in names}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one_entry_moved(model: Path, chance: random.Random) -> None:
    if not (model / INDEX).exists():
        return
    try:
        index = json.loads((model / INDEX).read_bytes())
        index["weight_map"][chance.choice((*TENSORS, "x"))] = chance.choice(NAMES)
    except (ValueError, KeyError, TypeError):
        return
    (model / INDEX).write_text(json.dumps(index))


def no_index(model: Path, chance: random.Random) -> None:
    (model / INDEX).unlink(missing_ok=True)


def single_beside(model: Path, chance: random.Random) -> None:
    write_single(model, chance.choice((TENSORS, OTHERS)))


def single_only(model: Path, chance: random.Random) -> None:
    for name in (*SHARDS, INDEX):
        (model / name).unlink(missing_ok=True)
    write_single(model, TENSORS)


def other_dtype(model: Path, chance: random.Random) -> None:
    kinds = (torch.bfloat16, torch.float64, torch.int8, torch.float8_e5m2)
    name = chance.choice(list(TENSORS))
    write_shards(model, TENSORS | {name: TENSORS[name].to(chance.choice(kinds))})


def other_tensors(model: Path, chance: random.Random) -> None:
    name = chance.choice(list(TENSORS))
    rest = {n: t for n, t in TENSORS.items() if n != name}
    more = {"lora_A": torch.zeros(1)}, {name: torch.zeros(3, 64)}, {}
    write_shards(model, rest | chance.choice(more))


def beside(model: Path, chance: random.Random) -> None:
    (model / chance.choice(BESIDE)).write_bytes(chance.choice((b"", b"weights", bytes(64))))


STEPS: tuple[Step, ...] = (
    missing, renamed, doubled, truncated, lengthened, header_changed, another_index,
    one_entry_moved, no_index, single_beside, single_only, other_dtype, other_tensors, beside,
)  # fmt: skip
HARMLESS = (single_only, beside, no_index)


def accepted(model: Path) -> bool:
    """Whether `check` finds nothing that would stop a run."""
    config = load_config(model.parent / "run.yaml", [f"model.path={model}"])
    found = [item for item in read_model(config) if isinstance(item, Problem)]
    return all(problem.level == "warning" for problem in found)


def load(model: Path) -> dict[str, torch.Tensor]:
    """Put every rule's parts together, as load_hf_weights does."""
    shape = model_shape(read_hf_config(model))
    source = HFCheckpoint(model, shape)
    for rule in rules_of(shape):
        merge(rule, source.parts(rule), shape)
    assert read_checkpoint_shapes(model).keys() == source.dtypes().keys()
    return {name: source[name] for rule in rules_of(shape) for name in rule.hf}


def holds(steps: list[Step], seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_config(model)
        write_shards(model, TENSORS)
        for step in steps:
            step(model, chance)
        if not accepted(model):
            assert not all(step in HARMLESS for step in steps)
            with pytest.raises(ModelFilesError):
                load(model)
            return
        found = load(model)
        if (model / INDEX).exists() or (model / "model.safetensors").exists():
            theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        else:  # transformers wants an index
            files = set(model.glob("*.safetensors")) - {model / name for name in BESIDE}
            theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name].float(), theirs[name].float()) for name in theirs)


CASES = given(st.lists(st.sampled_from(STEPS), max_size=3), st.integers(0, 2**32))


@CASES
@settings(max_examples=20, deadline=None, derandomize=True)
def test_what_check_accepts_loads(steps: list[Step], seed: int) -> None:
    holds(steps, seed)


@pytest.mark.full
@CASES
@settings(max_examples=250, deadline=None)
def test_what_check_accepts_loads_at_length(steps: list[Step], seed: int) -> None:
    holds(steps, seed)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_header_that_is_accepted_opens(data: st.DataObject) -> None:
    """safetensors itself agrees, tensor by tensor, on headers with a few other bytes in them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        header = json.dumps(
            {
                "__metadata__": {"format": "pt"},
                "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
                "b": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [8, 8]},
                "c": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
            }
        ).encode()
        text = bytearray(len(header).to_bytes(8, "little") + header + bytes(16))
        for _ in range(data.draw(st.integers(0, 2))):
            place = data.draw(st.integers(0, len(text) - 1))
            text[place] = data.draw(st.sampled_from(b'0123456789-.eE{}[]":, FBI64\\utn\xff\0'))
        file.write_bytes(text)
        try:
            entries = read_header(file)
        except ModelFilesError:
            return
        with safe_open(file, framework="pt") as handle:
            assert set(handle.keys()) == set(entries)
            for name, entry in entries.items():
                assert tuple(handle.get_slice(name).get_shape()) == entry.shape
                assert handle.get_slice(name).get_dtype() == entry.dtype


def test_a_good_header_is_accepted(tmp_path: Path) -> None:
    """Else the test above would pass for the wrong reason; and safetensors refuses what we do."""
    write_single(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    assert {n: e.shape for n, e in read_header(file).items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelFilesError):
        read_header(file)
    with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
        pass
