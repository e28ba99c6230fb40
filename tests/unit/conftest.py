"""Fixtures of several unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made.configs import EVALUATED, write_run

if TYPE_CHECKING:
    from made.fleets import Actor

    from sfpo_megatron.config.tree import RunConfig
    from sfpo_megatron.rollout.endpoint.server import Endpoint


@pytest.fixture
def here(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good config (run.yaml) and a good model; no GPU, whatever is
    on this machine."""
    from sfpo_megatron.config import check

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "has_cuda", lambda: False)
    model_dir()
    write_run(data=EVALUATED)
    return tmp_path


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """Every actor that a fleet starts, in order."""
    from sfpo_megatron.rollout import slots

    monkeypatch.setattr(slots.ray, "kill", lambda actor: actor.dead.set())
    monkeypatch.setattr(slots.ray, "cancel", lambda answer: answer.task.cancel())
    monkeypatch.setattr(slots, "_POLL_S", 0.02)
    return []


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A real one of transformers, trained on the spot."""
    from sfpo_megatron.demo.tiny_model import train_tokenizer

    texts = ["State the final answer to the following arithmetic problem: 1 + 2 - 3 ="] * 4
    return train_tokenizer(texts, 383)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's problems."""
    from sfpo_megatron.demo.legs import write_data

    folder = tmp_path_factory.mktemp("demo") / "data"
    write_data(folder)
    return folder


@pytest.fixture
def after_demo(tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples and the demo's problems, where the examples look for
    them."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(Path(__file__).parents[2] / "examples")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/data").symlink_to(demo_data)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole model in two shards, model/ in the working directory; no GPU."""
    from made.model_files import random_tensors, write_config, write_shards

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sfpo_megatron.config.check.has_cuda", lambda: False)
    write_config(tmp_path / "model")
    write_shards(tmp_path / "model", random_tensors())
    return tmp_path / "model"


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """run.yaml in the working directory, for `check` and `slurm`; read."""
    from sfpo_megatron.config.load import load_config

    monkeypatch.chdir(tmp_path)
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    model_dir()
    Path("run.yaml").write_text(
        "output_dir: run\nmodel: {path: model}\nparallel: {data: null}\n"
        "data: {train: [{source: reasoning_gym, task: chain_sum, size: 40}]}\n"
    )
    return load_config("run.yaml", [])


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """A real one of transformers, with the tokens of chats."""
    from sfpo_megatron.demo.tiny_model import train_tokenizer

    tokenizer = train_tokenizer(["What is 1 + 2 - 3? It is 0. ÄÖ"] * 4, 383)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def template(chat_tokenizer: Any) -> Iterator[Any]:
    """A function that sets the chat template."""

    def use(text: str | None) -> Any:
        chat_tokenizer.chat_template = text
        return chat_tokenizer

    yield use
    chat_tokenizer.chat_template = None


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    from made.endpoint import MAX_BYTES

    from sfpo_megatron.rollout.endpoint.server import Endpoint

    made = Endpoint(max_request_bytes=MAX_BYTES)
    yield made
    made.close()
