"""The pure parts of rollouts and refit: buckets, the name check, the shared file, seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfpo_megatron.config.tree import RefitConfig
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.resharding.transports import shared_file
from sfpo_megatron.resharding.transports.tensor_names import (
    ManifestError,
    TensorMeta,
    check_manifest,
    plan_buckets,
    read_checkpoint_shapes,
)
from sfpo_megatron.rollout.sampling import request_seed, stop_token_ids

Metas = st.lists(
    st.tuples(st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16])),
    min_size=1,
    max_size=30,
)


@given(Metas, st.integers(64, 4096))
def test_buckets_cover_every_tensor_once_without_overlap(sizes: Any, bucket_bytes: int) -> None:
    manifest = [
        TensorMeta(name=str(i), dtype=dtype, shape=(n,)) for i, (n, dtype) in enumerate(sizes)
    ]
    buckets, buffer_bytes = plan_buckets(manifest, bucket_bytes)
    index = 0
    for bucket in buckets:
        assert bucket.first == index
        end = 0
        for offset in bucket.offsets:
            assert offset >= end and offset % 64 == 0
            end = offset + manifest[index].num_bytes
            assert end <= buffer_bytes
            index += 1
        assert end <= bucket_bytes or len(bucket.offsets) == 1
    assert index == len(manifest)
    total = sum(-(-meta.num_bytes // 64) * 64 for meta in manifest)
    assert buffer_bytes <= total
    assert buffer_bytes <= max(bucket_bytes, *(meta.num_bytes for meta in manifest))


def test_check_manifest_takes_a_tied_head_or_none() -> None:
    embedding = TensorMeta(name="model.embed_tokens.weight", dtype=torch.float32, shape=(8, 4))
    head = TensorMeta(name="lm_head.weight", dtype=torch.float32, shape=(8, 4))
    expected = {embedding.name: (8, 4)}
    check_manifest([embedding], expected, dtype=torch.float32, tied_embeddings=True)
    check_manifest([embedding, head], expected, dtype=torch.float32, tied_embeddings=True)
    both = expected | {head.name: (8, 4)}
    check_manifest([embedding], both, dtype=torch.float32, tied_embeddings=True)
    with pytest.raises(ManifestError, match=r"lm_head.weight: missing"):
        check_manifest([embedding], both, dtype=torch.float32, tied_embeddings=False)
    with pytest.raises(ManifestError, match="sent twice"):
        check_manifest([embedding, embedding], expected, dtype=torch.float32, tied_embeddings=True)


def test_checkpoint_shapes_from_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    save_file({"old": torch.zeros(4)}, tmp_path / "not-listed.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_checkpoint_shapes(tmp_path) == {"a": (2, 3), "b": (4,)}
    with pytest.raises(ManifestError, match=r"no \*.safetensors"):
        read_checkpoint_shapes(tmp_path / "nowhere")


def test_shared_file_is_private_and_shared(tmp_path: Path) -> None:
    path = shared_file.create(1000, tmp_path)
    assert path.parent == shared_file.SHARED_MEMORY_DIR
    assert path.stat().st_mode & 0o777 == 0o600
    one, two = shared_file.map_bytes(path, 1000), shared_file.map_bytes(path, 1000)
    path.unlink()  # the maps stay
    one.fill_(7)
    assert torch.equal(two, torch.full((1000,), 7, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError, match="one node"):
        shared_file.map_bytes(path, 1000)


def test_full_shared_memory_falls_back_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = shared_file.free_bytes
    full = shared_file.SHARED_MEMORY_DIR
    monkeypatch.setattr(shared_file, "free_bytes", lambda d: 10 if d == full else real(d))
    path = shared_file.create(1000, tmp_path / "run")
    assert path.parent == tmp_path / "run" and path.stat().st_size == 1000
    assert len(caplog.records) == 1 and "no 0.0 MiB of shared memory" in caplog.text
    with pytest.raises(OSError, match=r"lower refit.bucket_bytes"):
        shared_file.create(2**60, tmp_path / "run")


def test_a_failing_engine_leaves_no_rank_in_the_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender takes part to the end, then raises; a non-sender never imports the transport."""
    import fleet

    from sfpo_megatron.resharding import transports

    taken: list[str] = []

    class Source:
        control, sharded = fleet.OneRank(), None

        def metadata(self) -> list[Any]:
            return [TensorMeta(name=n, dtype=torch.float32, shape=(1,)) for n in ("a", "b", "c")]

        def __iter__(self) -> Any:
            for name in ("a", "b", "c"):
                taken.append(name)
                yield name, torch.zeros(1)

    class Transport:
        def __init__(self, filler: Any) -> None:
            self._filler = filler

        def send_weights(self, weight_version: str) -> int:
            self._filler.begin()
            self._filler.fill_next(torch.zeros(self._filler.buffer_bytes, dtype=torch.uint8))
            raise RuntimeError("the controller refused")

    class Client:
        def prepare(self, version: int, *, only_stale: bool) -> None:
            pass

        def needs_introduction(self) -> bool:
            return False

    config = fleet.make_config(Path("model"), Path("run"))
    config = dataclasses.replace(config, refit=RefitConfig(transport="shm", bucket_bytes=4096))
    monkeypatch.setattr(transports, "sender", lambda *a, driver, **k: Transport(driver))
    with pytest.raises(RuntimeError, match="the controller refused"):
        Refit(config, source=Source(), client=Client()).send(1)
    assert taken == ["a", "b", "c"]
    taken.clear()
    monkeypatch.setattr(transports, "sender", None)
    assert Refit(config, source=Source(), client=None).send(1) == 0
    assert taken == ["a", "b", "c"]


def test_request_seed_is_stable_and_separates_its_fields() -> None:
    assert request_seed(0, 1, "train/5", 2) == request_seed(0, 1, "train/5", 2)
    assert request_seed(0, 1, "train/5", 2) == 1431614227549828871  # across processes and releases
    seeds = {
        request_seed(run, step, prompt, sample)
        for run in range(2)
        for step in range(12)
        for prompt in ("a/1", "a/11", "b/1")
        for sample in range(12)
    }
    assert len(seeds) == 2 * 12 * 3 * 12
    assert all(0 <= seed < 2**63 for seed in seeds) and math.log2(max(seeds)) > 60


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id: int | None = 7

    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert stop_token_ids(tmp_path, Tokenizer()) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert stop_token_ids(tmp_path, Tokenizer()) == (7, 9)
    (tmp_path / "generation_config.json").unlink()
    Tokenizer.eos_token_id = None
    assert stop_token_ids(tmp_path, Tokenizer()) == (3,)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no response ever ends"):
        stop_token_ids(tmp_path, Tokenizer())
