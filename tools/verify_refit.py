"""Load a checkpoint into Megatron at a layout, refit a vLLM engine, compare every parameter.

    python tools/verify_refit.py CHECKPOINT [--tensor 2] [--pipeline 2] [--data 1] [--expert 1]
                                 [--engine-tensor 1] [--dtype bfloat16] [--bucket-bytes N]

CHECKPOINT: a Hugging Face directory; a torch_dist checkpoint of the trainer or of Megatron-LM, or a
folder of several, which Megatron itself loads into the layout; the output directory of a run (its
hf/, else its newest checkpoint). --hf: the model's config.json and tokenizer, where they are not
found beside a torch_dist checkpoint. The engine is started on the same architecture with every
weight zero, so that nothing it holds can pass for what was sent. Checksums are computed on the
Megatron shards and inside the engine; the first parameter that differs is named. Exit code 0: all
equal; 1: not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

from sfpo_megatron.config.paths import path_from_option
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    RefitConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from sfpo_megatron.families.weight_files import has_weights
from sfpo_megatron.outputs.directory import RunDirectory

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=path_from_option)
    for name in ("tensor", "pipeline", "data", "expert", "engine-tensor"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--hf", type=path_from_option, help="has config.json and tokenizer (default: found)"
    )
    parser.add_argument("--bucket-bytes", type=int, default=RefitConfig().bucket_bytes)
    parser.add_argument("--work", type=path_from_option, help=argparse.SUPPRESS)
    return parser.parse_args()


def weights_of(checkpoint: Path) -> Path:
    """The directory to read: Hugging Face's, or else torch_dist."""
    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.convert.locate import locate

    for folder in (checkpoint, RunDirectory(checkpoint).hf):
        if has_weights(folder):
            return folder
    try:
        return locate(checkpoint).directory
    except CheckpointError as error:
        raise SystemExit(
            f"error: {checkpoint}: found no config.json with *.safetensors and no torch_dist "
            f"checkpoint, expected one of them ({error})"
        ) from None


def blank_model(source: Path, companions: Path | None, out: Path) -> None:
    """A Hugging Face directory of the model in `source` with zeros for weights."""
    import torch
    from safetensors.torch import save_file

    from sfpo_megatron.convert.locate import hf_files, locate
    from sfpo_megatron.convert.to_hf import MegatronWeights
    from sfpo_megatron.families.shape import model_shape, read_hf_config
    from sfpo_megatron.resharding.transports.tensor_names import read_checkpoint_shapes

    if has_weights(source):
        files, shapes = source, read_checkpoint_shapes(source)
    else:
        files = companions or hf_files(locate(source))
        weights = MegatronWeights(source, model_shape(read_hf_config(files)))
        shapes = {meta.name: meta.shape for meta in weights.specs(None)}
    out.mkdir(parents=True)
    for file in files.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(file, out / file.name)
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, out / "model.safetensors", metadata={"format": "pt"})


def run_rank(args: argparse.Namespace) -> None:
    """One Megatron rank; rank 0 has the engine."""
    config = RunConfig(
        output_dir=str(args.work / "run"),
        model=ModelConfig(path=str(args.work / "blank"), dtype=args.dtype),
        parallel=ParallelConfig(
            data=args.data, tensor=args.tensor, pipeline=args.pipeline, expert=args.expert
        ),
        data=DataConfig(train=(DataSource(source="jsonl", path="unused"),)),
        rollout=RolloutConfig(tensor_parallel=args.engine_tensor, max_restarts=0),
        refit=RefitConfig(bucket_bytes=args.bucket_bytes, verify_every=1),
        reward=RewardConfig(function="exact_match"),
    )
    from sfpo_megatron.mcore.setup import LRSchedule, build_policy, init_distributed

    client = None
    if os.environ["RANK"] == "0":
        from sfpo_megatron.rollout.controller import start_rollouts

        client = start_rollouts(config, model_path=config.model.path)
    try:
        capabilities = init_distributed(config)
        schedule = LRSchedule(peak=0.0, floor=0.0, warmup_ticks=0, total_ticks=1, style="constant")
        weights = weights_of(args.checkpoint)
        given = weights if has_weights(weights) else args.work / "blank"
        policy = build_policy(config, capabilities, schedule, model_path=str(given))
        if given != weights:
            from sfpo_megatron.mcore.checkpoint import load_weights

            load_weights(policy, weights)
        from sfpo_megatron.resharding.refit import Refit
        from sfpo_megatron.resharding.source import MegatronWeightSource

        source = MegatronWeightSource(policy)
        if client is not None:
            client.wait_ready()
        policy.control.barrier()
        sender = Refit(config, source=source, client=client.sync_client if client else None)
        num_bytes = sender.send(1)
        if client is not None:
            client.check()
            num = len(source.metadata())
            print(f"equal: {num} parameters, {num_bytes} bytes, {source.plan.bytes_by_rank()}")
        sender.close()
    finally:
        if client is not None:
            client.close()


def main() -> None:
    args = parse_args()
    from sfpo_megatron.checkpoints.store import CheckpointError

    if args.work is not None:
        from sfpo_megatron.rollout.errors import RolloutError

        try:
            run_rank(args)
        except (RolloutError, CheckpointError) as error:
            raise SystemExit(f"error: {error}") from None
        return
    source = weights_of(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        try:
            blank_model(source, args.hf, Path(folder) / "blank")
        except CheckpointError as error:
            raise SystemExit(f"error: {error}") from None
        ranks = args.data * args.tensor * args.pipeline
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", __file__, *sys.argv[1:], "--work", folder]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
        print(json.dumps({"checkpoint": str(source), "ranks": ranks}), flush=True)
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        if done.returncode:
            raise SystemExit(errors[0] if errors else done.stderr[-3000:])


if __name__ == "__main__":
    main()
