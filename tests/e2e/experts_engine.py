"""A vLLM engine of its own process on a mixture of experts, refitted with and without the guard
that has its weights packed again. `python experts_engine.py DIR qwen3_moe|mixtral|deepseek_v3`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch


def make_model(directory: Path, kind: str, seed: int) -> Path:
    import transformers

    name, extra = {
        "qwen3_moe": (
            "Qwen3MoeConfig",
            {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
        ),
        "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
        "deepseek_v3": ("DeepseekV3Config", tiny.DEEPSEEK_V3),
    }[kind]
    common: dict[str, Any] = {
        "vocab_size": len(tiny.VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 72,  # not a multiple of 32: vLLM's CPU kernel pads it
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tiny.EOS,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, name)(**common | extra)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny.randomize_choice_biases(model)
    model.save_pretrained(directory)
    tiny.make_tokenizer(directory, tiny.VOCABULARY)
    return directory


def resend(llm: Any, models: list[Path], folder: Path) -> list[int]:
    """Send one model after another over one transport; the tensors of each that went through vLLM's
    own loaders, which count the elements of each, instead of being replayed."""
    import fleet
    from engines import connected
    from vllm.model_executor.model_loader.reload import layerwise

    counts: list[int] = []
    original = layerwise.get_numel_loaded

    def counting(*arguments: Any) -> Any:
        counts[-1] += 1
        return original(*arguments)

    source = fleet.StateSource(tiny.load_state(models[0]))
    filler, transport = connected(llm, source, folder)
    layerwise.get_numel_loaded = counting
    try:
        for number, model in enumerate(models):
            counts.append(0)
            source.state = tiny.load_state(model)
            filler.restart(fresh=number == 0, verify=False)
            transport.send_weights()
    finally:
        layerwise.get_numel_loaded = original
        transport.shutdown()
    return counts


def main(folder: Path, kind: str) -> None:
    from sfpo_megatron.rollout.actor_variables import actor_variables

    os.environ.update(actor_variables("engine", on_gpu=True, is_restart=True))
    a, b = make_model(folder / "a", kind, 1), make_model(folder / "b", kind, 2)
    import fleet
    from engines import greedy, send
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    from sfpo_megatron.resharding.transports.shm import ShmEngine

    llm = LLM(
        model=str(a),
        skip_tokenizer_init=True,
        dtype="float32",
        # Where the processor has AMX vLLM takes a backend that has no fp32.
        attention_backend="CPU_MLA" if kind == "deepseek_v3" else None,
        max_model_len=fleet.MAX_PROMPT_TOKENS + fleet.MAX_RESPONSE_TOKENS,
        block_size=32,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        weight_transfer_config={"backend": "sfpo_shm"},
        enable_prefix_caching=False,
    )

    def is_model(directory: Path) -> bool:
        """Greedy choices are transformers'; their log-probs within 1e-3."""
        reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for (tokens, logprobs), prompt in zip(greedy(llm), fleet.PROMPTS, strict=True):
            ids = torch.tensor([[*prompt.token_ids, *tokens]])
            with torch.no_grad():
                logits = reference(ids).logits[0, len(prompt.token_ids) - 1 : -1]
            best = torch.log_softmax(logits, dim=-1).max(dim=-1)
            found = torch.tensor(logprobs)
            if best.indices.tolist() != list(tokens) or (best.values - found).abs().max() > 1e-3:
                return False
        return True

    assert is_model(a)
    send(llm, tiny.load_state(b), folder)
    assert is_model(b) and not is_model(a)
    first, *later = resend(llm, [a, b, a], folder)
    assert is_model(a) and not is_model(b)
    num_experts = sum(".experts." in name for name in tiny.load_state(a))
    print(f"tensors that vLLM took itself: {first}, then {later}, of {num_experts} of experts")
    assert num_experts - 2 <= first - max(later) <= num_experts, (
        "but the last of each of two layers"
    )
    send(llm, tiny.load_state(b), folder)
    assert is_model(b)
    guard = ShmEngine.forget_expert_kernels
    ShmEngine.forget_expert_kernels = lambda self: None  # type: ignore[method-assign]
    try:
        send(llm, tiny.load_state(a), folder)
        assert not is_model(a), "vLLM packs them by itself now: the guard can go"
    except RuntimeError as error:  # padded experts do not even fit
        assert "must match the size" in str(error), error
    ShmEngine.forget_expert_kernels = guard  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
