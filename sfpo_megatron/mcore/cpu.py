"""Run Megatron-Core on a machine without CUDA: `install()` answers its CUDA calls on the CPU.

Megatron-Core hard-codes `device="cuda"`, `torch.cuda.current_device()`, CUDA streams and RNG, and
tests tensor types by their CUDA names. Each entry below replaces one such name of torch by what
the CPU has; none of Megatron's own code is changed. Called from `mcore.setup`, never at import,
and never where CUDA is available (a test asserts that this module is then not even imported).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors

from sfpo_megatron.host.variables import settle

ToArgument: TypeAlias = torch.device | torch.dtype | Tensor | str | int | bool | None
"""What `Tensor.to`, `.type` and `.cuda` take."""
Sizes: TypeAlias = Iterable[int] | Tensor | None


class _Name(NamedTuple):
    """A name of torch or Megatron, and what it stands for."""

    owner: ModuleType | type
    name: str
    value: Any


_installed: list[_Name] = []  # with the originals, newest last

_FACTORIES = (
    *("arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace"),
    *("ones", "ones_like", "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like"),
)


class _NullStream:
    """A stream or event on a device that has one queue: everything is already in order."""

    def __init__(
        self, device: torch.device | int | None = None, priority: int = 0, **kwargs: bool
    ) -> None:
        """Take what torch's Stream, or its Event by keyword, takes."""

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _NullStream | None = None) -> _NullStream:
        return event if event is not None else _NullStream()

    def elapsed_time(self, other: _NullStream) -> float:
        raise RuntimeError("CUDA events carry no time on CPU; use a wall clock")

    def _nothing(self, other: _NullStream | None = None) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing


class _DefaultGenerators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _is_cuda(device: ToArgument) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _tensor_to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def to(self: Tensor, *args: ToArgument, **kwargs: ToArgument) -> Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., str]) -> Callable[..., Tensor | str]:
    """Answer `t.type()` by "torch.cuda.FloatTensor": Megatron's optimizer sorts tensors by it."""

    @functools.wraps(original)
    def type_(self: Tensor, *args: ToArgument, **kwargs: ToArgument) -> Tensor | str:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _all_to_all_with_ints(
    original: Callable[..., dist.Work | None],
) -> Callable[..., dist.Work | None]:
    """Pass split sizes as integers, which gloo wants; Megatron's MoE dispatcher passes tensors."""

    @functools.wraps(original)
    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sizes = None,
        input_split_sizes: Sizes = None,
        **kw: dist.ProcessGroup | bool | None,
    ) -> dist.Work | None:
        sizes = (
            None if s is None else [int(n) for n in s]
            for s in (output_split_sizes, input_split_sizes)
        )
        return original(output, input, *sizes, **kw)

    return all_to_all_single


def _not_compiled(model: Any = None, **kwargs: Any) -> Any:
    """torch.compile as a function, or as a decorator with arguments."""
    return model if model is not None else lambda function: function


def _replacements() -> list[_Name]:
    """Owner, name and replacement of every name of torch that Megatron uses and a CPU lacks."""

    # A function object of its own for every name: torch._dynamo, imported by torch.optim, files
    # torch's functions by identity and refuses to start if two names share one.
    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def get_rng() -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: torch.get_rng_state()

    def set_rng() -> Callable[..., None]:
        return lambda state, *args, **kwargs: torch.set_rng_state(state)

    cuda = torch.cuda
    found = [
        # Once vLLM is imported, a CUDA build of torch decides this by the count below.
        (cuda, "is_available", lambda: False),
        (cuda, "current_device", lambda: torch.device("cpu")),
        (cuda, "device_count", lambda: 1),
        *((cuda, name, nothing()) for name in ("set_device", "synchronize", "empty_cache")),
        (cuda, "Stream", _NullStream),
        (cuda, "Event", _NullStream),
        (cuda, "current_stream", lambda *args: _NullStream()),
        (cuda, "default_stream", lambda *args: _NullStream()),
        (cuda, "stream", lambda stream: _NullStream()),
        (cuda, "get_rng_state", get_rng()),
        (cuda, "set_rng_state", set_rng()),
        (cuda.random, "get_rng_state", get_rng()),
        (cuda.random, "set_rng_state", set_rng()),
        (cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (cuda, "_lazy_call", lambda call, **kwargs: call()),
        (cuda, "_lazy_init", nothing()),
        (cuda, "default_generators", _DefaultGenerators()),
        # A CUDA build of torch without a GPU: by the count above Adam would find CUDA, and ask it
        # whether a graph is being captured.
        (torch.accelerator, "current_accelerator", nothing()),
        # Megatron's jit_fuser: on CPU it would compile C++ at a fused function's first call.
        (torch, "compile", _not_compiled),
        *((torch, name, _on_cpu(getattr(torch, name))) for name in _FACTORIES),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.nn.Module, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "to", _tensor_to(torch.Tensor.to)),
        (torch.Tensor, "type", _tensor_type(torch.Tensor.type)),
        (torch.Tensor, "record_stream", nothing()),
        (
            torch.distributed,
            "all_to_all_single",
            _all_to_all_with_ints(torch.distributed.all_to_all_single),
        ),
    ]
    return [_Name(*each) for each in found]


def install() -> None:
    """Answer Megatron's CUDA calls on the CPU in this process. Idempotent. Call it before
    `megatron` is imported: some of its modules bind these names then."""
    if torch.cuda.is_available():
        raise RuntimeError("mcore.cpu.install() on a machine with CUDA: Megatron runs there as is")
    if _installed:
        return
    settle("rank", "cpu")
    # `with torch.device(...)` knows factories by identity, those of when it is first asked. Asked
    # below, it would leave all tensors where they are, and transformers' rotary tables empty.
    _device_constructors()
    for owner, name, replacement in _replacements():
        _installed.append(_Name(owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)
    import megatron.core.transformer.moe.moe_utils as moe_utils

    # Undefined without TransformerEngine (0.16.1), yet read by the router.
    if not hasattr(moe_utils, "te_general_gemm"):
        _installed.append(_Name(moe_utils, "te_general_gemm", None))
        moe_utils.te_general_gemm = None


def uninstall() -> None:
    """Put torch's own names back (tests)."""
    while _installed:
        owner, name, original = _installed.pop()
        setattr(owner, name, original)
