"""Real engines, started once for all e2e tests: a start costs half a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleet
import psutil
import pytest
import tiny
import torch
from safetensors.torch import save_file

from sfpo_megatron.host.temporary import short_folder
from sfpo_megatron.rollout import controller as controller_module
from sfpo_megatron.rollout.actor_variables import actor_variables
from sfpo_megatron.rollout.client import RolloutClient


@pytest.fixture(scope="session", autouse=True)
def sockets() -> Iterator[None]:
    """A vLLM outside of a run leaves its sockets in the folder for temporary files: here in one
    that goes with them, and has room for their names."""
    scratch = short_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", scratch.path)
        yield
    scratch.remove()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of the same shape, with tied and with untied embeddings."""
    root = tmp_path_factory.mktemp("models")
    made = {
        f"{kind}_{name}": tiny.make_model(root / f"{kind}_{name}", seed=seed, tied=kind == "tied")
        for kind in ("tied", "untied")
        for name, seed in (("a", 1), ("b", 2))
    }
    # What vLLM's own loader would take in place of the model.
    others = {"tok_embeddings.weight": torch.zeros(1)}
    save_file(others, made["tied_a"] / "consolidated.safetensors")
    return made


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a fleet; at the end all are closed, and no process of any may be left."""
    import ray

    clients: list[RolloutClient] = []

    def start_fleet(model: Path, **rollout: Any) -> RolloutClient:
        # Engine processes do not have tests/ on their path.
        ray.cloudpickle.register_pickle_by_value(fleet)
        config = fleet.make_config(model, tmp_path_factory.mktemp("run"), **rollout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(controller_module, "RolloutController", fleet.SwitchableController)
            # As torchrun sets them: an engine that saw these would wait for other ranks.
            for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
                patch.setenv(name, value)
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", "1")
            patch.setenv("CXX", "/nonexistent")  # a machine without a C++ compiler is enough
            client = controller_module.start_rollouts(config, model_path=str(model))
        clients.append(client)
        return client

    yield start_fleet
    identities = [identity for client in clients for identity in fleet.processes_of(client)]
    for client in reversed(clients):  # the first owns the cluster
        client.close()
    assert identities
    left = [identity for identity in identities if identity.alive]
    assert not left, f"processes left behind: {left}"
    names = {child.name() for child in psutil.Process().children(recursive=True)}
    assert not names & {"raylet", "gcs_server"}, names
    mine = {str(pid) for pid in (os.getpid(), *(identity.pid for identity in identities))}
    segments = Path("/dev/shm").glob("sfpo-refit-*")  # sfpo-refit-PID-...
    assert not [path for path in segments if path.name.split("-")[2] in mine]


@pytest.fixture(scope="session")
def fleets(
    request: pytest.FixtureRequest, start: Any, models: dict[str, Path]
) -> dict[str, RolloutClient]:
    """Those of `tied` and `untied_tp2` that the chosen tests use: they load side by side."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    fleets = {"tied": (models["tied_a"], 1), "untied_tp2": (models["untied_a"], 2)}
    return {
        name: start(model, tensor_parallel=size)
        for name, (model, size) in fleets.items()
        if name in used
    }


@pytest.fixture(scope="session")
def tied(fleets: dict[str, RolloutClient]) -> RolloutClient:
    """Tied embeddings, tensor_parallel 1, started on tied_a. Tests that refit it say to what."""
    fleets["tied"].wait_ready(300)
    return fleets["tied"]


@pytest.fixture(scope="session")
def untied_tp2(fleets: dict[str, RolloutClient]) -> RolloutClient:
    """Untied embeddings, tensor_parallel 2, started on untied_a."""
    fleets["untied_tp2"].wait_ready(300)
    return fleets["untied_tp2"]


@pytest.fixture(scope="session")
def llm(models: dict[str, Path]) -> Any:
    """A vLLM engine inside this process, whose guards tests can take out; started on tied_b."""
    os.environ.update(actor_variables("engine", on_gpu=False, is_restart=True))
    from vllm import LLM

    with torch.random.fork_rng():
        return LLM(
            model=str(models["tied_b"]),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=fleet.MAX_PROMPT_TOKENS + fleet.MAX_RESPONSE_TOKENS,
            block_size=32,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            weight_transfer_config={"backend": "sfpo_shm"},
            enable_prefix_caching=False,
        )
