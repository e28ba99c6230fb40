"""What a refit of many small expert tensors costs an engine: replayed, and by vLLM's own loaders.

    python benchmarks/expert_refit.py [--layers 4] [--rounds 5] [--out FILE]

A Qwen3-MoE of 128 experts a layer, so small that its bytes do not count, through shared memory into
one vLLM engine in this process. `replayed` is what a run does from an engine's second update on
(resharding/transports/replaying.py); for `vllm` what was noted is forgotten before each update. The
rounds of both alternate; seconds are this process's on the CPU, the trainer's filling included. CPU
alone. Prints a line and writes benchmarks/results/expert_refit.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch

from benchmarks.common import provenance

sys.path += [str(provenance.ROOT / "tests"), str(provenance.ROOT / "tests/e2e")]

NUM_EXPERTS, BUCKET_BYTES = 128, 16 * 2**20
QWEN3_30B_A3B = 48 * NUM_EXPERTS * 3
"""Its expert tensors, to which the difference is scaled."""


def make_model(folder: Path, num_layers: int) -> Path:
    import tiny
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tiny.VOCABULARY),
        hidden_size=128,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tiny.EOS,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny.make_tokenizer(folder, tiny.VOCABULARY)
    return folder


def measure(folder: Path, num_layers: int, rounds: int) -> dict[str, Any]:
    from sfpo_megatron.rollout.actor_variables import actor_variables

    os.environ.update(actor_variables("engine", on_gpu=True, is_restart=True))
    import fleet
    import tiny
    from engines import connected
    from vllm import LLM

    from sfpo_megatron.resharding.transports.replaying import Replay

    made: list[Replay] = []
    begin = Replay.__init__

    def kept(self: Replay, model: torch.nn.Module) -> None:
        begin(self, model)
        made.append(self)

    Replay.__init__ = kept  # type: ignore[method-assign]
    model = make_model(folder / "model", num_layers)
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        generation_config="vllm",
        weight_transfer_config={"backend": "sfpo_shm"},
    )
    state = tiny.load_state(model)
    source = fleet.StateSource(state)
    filler, transport = connected(llm, source, folder, bucket_bytes=BUCKET_BYTES)
    transport.send_weights()
    seconds: dict[str, list[float]] = {"replayed": [], "vllm": []}
    for _ in range(rounds):
        for arm, times in seconds.items():
            if arm == "vllm":
                made[-1].forget()
            filler.restart(fresh=False, verify=False)
            begun = time.process_time()
            transport.send_weights()
            times.append(time.process_time() - begun)
    transport.shutdown()
    medians = {arm: statistics.median(times) for arm, times in seconds.items()}
    num_tensors = sum(".experts." in name for name in state)
    saved_s = (medians["vllm"] - medians["replayed"]) / num_tensors
    return {
        "expert_tensors": num_tensors,
        "median_cpu_s": medians,
        "saved_us_a_tensor": 1e6 * saved_s,
        "saved_s_for_qwen3_30b_a3b": QWEN3_30B_A3B * saved_s,
        "cpu_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    default = provenance.ROOT / "benchmarks/results/expert_refit.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.layers, args.rounds)
    ours_s, theirs_s = found["median_cpu_s"]["replayed"], found["median_cpu_s"]["vllm"]
    print(
        f"{found['expert_tensors']} expert tensors: {ours_s:.3f} s replayed, {theirs_s:.3f} s by "
        f"vLLM's loaders; {found['saved_us_a_tensor']:.0f} us a tensor saved, "
        f"{found['saved_s_for_qwen3_30b_a3b']:.1f} s for Qwen3-30B-A3B"
    )
    device = torch.device("cpu")
    provenance.write(args.out, found, device=device, features=["refit-experts"])


if __name__ == "__main__":
    main()
