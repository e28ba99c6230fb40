"""Log-probs and exact entropy, forward and backward: peak memory and time, measured in one run.

    python benchmarks/logprobs.py [--device cpu|cuda] [--budget-s 10] [--out FILE]

Ours (mcore/logprobs.py as training calls it) against what is usually done on the same logits:

(a) full logits in fp32: log_softmax, gather, entropy from its output;
(b) Megatron's vocab_parallel_cross_entropy, and the entropy separately as in (a).

Peak memory is what the two directions allocate beyond the logits, the gradient included. Targets:
at most 1.15 of one fp32 chunk, and faster than (a). The error is that of values from float64
(torch's softmax on a CPU takes a fast exp). A target that is missed is printed as missed;
it does not fail the run. One tensor-parallel rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import provenance
from benchmarks.common.clock import Clock, keep_freed_memory
from benchmarks.common.isolated import isolated
from benchmarks.common.memory import peak_bytes

MAX_CHUNKS = 1.15
VOCABULARIES = {"SmolLM2": 49152, "Qwen2.5": 151936}
TOKENS = {"cpu": 1024, "cuda": 8192}
CHUNK = {"cpu": 256, "cuda": 1024}
"""`train.logprob_chunk_tokens`; on a CPU below TOKENS too, so that there are chunks."""
COLUMNS = (
    *("vocabulary", "tokens", "logits", "entropy grad"),
    *("ours MiB", "in chunks", "(a) MiB", "(b) MiB", "ours ms", "(a) ms", "(b) ms"),
    *("faster than (a)", "than (b)", "error, ours", "of (a)", "reached"),
)

Arm = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""(logits [T, V], labels [T], entropy_grad) -> (log-probs, entropy)."""


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def full_entropy(logits: Tensor, with_grad: bool) -> Tensor:
    with torch.set_grad_enabled(with_grad):
        log_p = torch.log_softmax(logits.float(), dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)


def full(logits: Tensor, labels: Tensor, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """(a)"""
    log_p = torch.log_softmax(_at_least_fp32(logits), dim=1)
    with torch.set_grad_enabled(entropy_grad):
        entropy = -(log_p.exp() * log_p).sum(dim=1)
    return log_p.gather(1, labels[:, None])[:, 0], entropy


def megatron(logits: Tensor, labels: Tensor, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """(b) The entropy first: the cross-entropy overwrites fp32 logits."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    entropy = full_entropy(logits, entropy_grad)
    return -vocab_parallel_cross_entropy(logits, labels), entropy


def ours(chunk: int, logits: Tensor, labels: Tensor, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    from sfpo_megatron.mcore.logprobs import vocab_parallel_logprobs

    assert dist.group.WORLD is not None
    return vocab_parallel_logprobs(
        logits,
        labels,
        vocab_size=logits.shape[1],
        group=dist.group.WORLD,
        chunk_tokens=chunk,
        with_entropy_grad=entropy_grad,
        reuse_logits=True,
    )


def start_megatron(device: torch.device) -> None:
    """A tensor-parallel group of this process alone, if it has none yet."""
    if dist.is_initialized():
        return
    from sfpo_megatron.mcore.capabilities import probe

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    probe()
    if device.type == "cpu":
        from sfpo_megatron.mcore import cpu

        cpu.install()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()


class Case:
    """One shape: every arm on the same logits, which an arm may overwrite."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        tokens = TOKENS[device.type]
        random = torch.Generator(device).manual_seed(0)
        self._saved = torch.empty(tokens, vocabulary, device=device, dtype=dtype)
        self._saved.normal_(0.0, 3.0, generator=random)
        self.logits = self._saved.clone().requires_grad_()
        self.labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=random)
        self._weights = torch.randn(tokens, device=device, generator=random)

    def call(self, arm: Arm, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """(log-probs and entropy, gradient)"""
        logprobs, entropy = arm(self.logits, self.labels, entropy_grad)
        loss = (logprobs * self._weights).sum()
        if entropy_grad:
            loss = loss - 0.01 * entropy.sum()
        (grad,) = torch.autograd.grad(loss, self.logits)
        return torch.stack([logprobs, entropy]).detach(), grad

    def restored(self, arm: Arm, entropy_grad: bool) -> Callable[[], object]:
        """A call to be measured, the logits as they were."""
        with torch.no_grad():
            self.logits.copy_(self._saved)
        return lambda: self.call(arm, entropy_grad)


def errors(case: Case, arms: dict[str, Arm]) -> dict[str, float]:
    """Distance of each arm's values from float64, relative above 1; checks that gradients agree."""
    exact, rows = [], 64
    for logits, labels in zip(case.logits.split(rows), case.labels.split(rows), strict=True):
        with torch.no_grad():
            exact.append(torch.stack(full(logits.double(), labels, False)))
    wanted = torch.cat(exact, dim=1)
    found, first = {}, None
    rounding = 1e-5 if case.logits.dtype == torch.float32 else 2**-7
    for key, arm in arms.items():
        case.restored(arm, True)
        values, grad = case.call(arm, True)
        found[key] = float(((values - wanted).abs() / wanted.abs().clamp(min=1)).max())
        first = grad.clone() if first is None else first  # ours is where the logits were
        torch.testing.assert_close(grad, first, rtol=rounding, atol=1e-4)
    return found


def measure(
    name: str, dtype: torch.dtype, entropy_grad: bool, device: torch.device, budget_s: float
) -> dict[str, Any]:
    """One row. On a CPU in a process of its own: it changes malloc."""
    start_megatron(device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as a rank has
    chunk, clock = CHUNK[device.type], Clock(device)
    case = Case(VOCABULARIES[name], dtype, device)
    arms: dict[str, Arm] = {"ours": lambda *args: ours(chunk, *args), "a": full, "b": megatron}
    error = errors(case, arms)
    peaks = {key: peak_bytes(case.restored(arm, entropy_grad), device) for key, arm in arms.items()}
    if device.type == "cpu":
        keep_freed_memory()
    seconds: dict[str, list[float]] = {key: [] for key in arms}
    start = time.perf_counter()
    for _ in range(101):
        for key, arm in arms.items():
            seconds[key].append(clock.seconds(case.restored(arm, entropy_grad)))
        if time.perf_counter() - start > budget_s and len(seconds["a"]) >= 5:
            break
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    chunks = peaks["ours"] / (4 * chunk * case.logits.shape[1])
    speedup = medians["a"] / medians["ours"]
    return {
        "vocabulary": case.logits.shape[1],
        "tokens": case.logits.shape[0],
        "logits": str(dtype).removeprefix("torch."),
        "entropy_grad": entropy_grad,
        "chunk_tokens": chunk,
        "logits_bytes": case.logits.nbytes,
        "peak_bytes": peaks,
        "peak_in_chunks": chunks,
        "rounds": len(seconds["a"]) - 1,
        "median_s": medians,
        "speedup_over_a": speedup,
        "speedup_over_b": medians["b"] / medians["ours"],
        "error": error,
        "reached": chunks <= MAX_CHUNKS and speedup > 1,
    }


def line(row: dict[str, Any]) -> str:
    mib = [f"{row['peak_bytes'][arm] / 2**20:.0f}" for arm in ("ours", "a", "b")]
    cells = [
        *(str(row[key]) for key in ("vocabulary", "tokens", "logits", "entropy_grad")),
        *(mib[0], f"{row['peak_in_chunks']:.2f}", *mib[1:]),
        *(f"{1e3 * row['median_s'][arm]:.1f}" for arm in ("ours", "a", "b")),
        *(f"{row['speedup_over_a']:.1f}x", f"{row['speedup_over_b']:.1f}x"),
        *(f"{row['error'][arm]:.0e}" for arm in ("ours", "a")),
        "yes" if row["reached"] else "NO",
    ]
    return f"| {' | '.join(cells)} |"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, help="file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    name = "logprobs_gpu.json" if gpu else "logprobs.json"
    print(provenance.hardware(device))
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    out = args.out or provenance.ROOT / "benchmarks" / "results" / name
    rows: list[dict[str, Any]] = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            for entropy_grad in (False, True):
                arguments = (vocabulary, dtype, entropy_grad, device, args.budget_s)
                # A GPU's start takes most of a row's time.
                rows.append(measure(*arguments) if gpu else isolated(measure, *arguments))
                print(line(rows[-1]), flush=True)
                provenance.keep(out, {"rows": rows}, device=device)
    provenance.write(out, {"rows": rows}, device=device, features=["logprobs"])


if __name__ == "__main__":
    main()
