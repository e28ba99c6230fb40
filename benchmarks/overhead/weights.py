"""fp32 tensors as a rank's main params are: sizes of Qwen2 models, a tensor of its own each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class Sizes:
    """A Qwen2-style model with tied embeddings, named as Hugging Face's config names them."""

    hidden: int
    ffn: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of every tensor, with qkv and gate-up fused as in Megatron."""
        h = self.hidden
        qkv = h + 2 * self.kv_heads * (h // self.heads)
        layer = [(h,), (qkv, h), (qkv,), (h, h), (h,), (2 * self.ffn, h), (h, self.ffn)]
        return [(self.vocab, h), *(shape for _ in range(self.layers) for shape in layer), (h,)]

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """A Hugging Face directory with random weights; token 1 ends a text."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config = transformers.Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)


SIZES = {
    "1M": Sizes(hidden=128, ffn=384, layers=4, vocab=2048, heads=4, kv_heads=2),
    "10M": Sizes(hidden=256, ffn=1024, layers=8, vocab=8192, heads=4, kv_heads=2),
    "100M": Sizes(hidden=512, ffn=2048, layers=16, vocab=81920, heads=8, kv_heads=2),
    "500M": Sizes(hidden=896, ffn=4864, layers=24, vocab=151936, heads=14, kv_heads=2),
    "3B": Sizes(hidden=2048, ffn=11008, layers=36, vocab=151936, heads=16, kv_heads=2),
    "7B": Sizes(hidden=3584, ffn=18944, layers=28, vocab=152064, heads=28, kv_heads=4),
}
"""From 500M on those of Qwen2.5, its 7B with tied embeddings."""
ON_CPU, ON_GPU = ("1M", "10M", "100M", "500M"), ("100M", "500M", "3B", "7B")


class PlainShards:
    """`WeightShards` over separate tensors, as a distributed optimizer's fp32 masters of bf16
    params are. Nothing to publish, so that only the algorithm's own work is measured."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self._tensors = [
            torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator).view(-1)
            for shape in sizes.shapes()
        ]

    def tensors(self) -> list[Tensor]:
        return self._tensors

    def publish(self) -> None:
        pass

    def before_step(self, callback: Callable[[], None]) -> None:
        """No optimizer steps here."""

    @property
    def num_params(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors)


@torch.no_grad()
def reference_way(params: list[Tensor], alpha: float) -> None:
    """What the released reference does with each parameter: clone the slow weights, (fast passes,)
    clone the fast ones, the formula written out, copy back."""
    slow = [param.clone() for param in params]
    fast = [param.clone() for param in params]
    for param, before, after in zip(params, slow, fast, strict=True):
        param.copy_(before + alpha * (after - before))
