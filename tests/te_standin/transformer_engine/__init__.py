"""A stand-in for TransformerEngine in plain torch, so that Megatron's TE layer spec runs on a CPU.

It has the names, constructors and parameter names of the classes that Megatron-Core subclasses.

Put on sys.path by tests/dist alone. It proves names, shapes and layout of the TE path, not TE's
kernels: no FP8, no dropout, no fused anything. What is missing raises.
"""

from transformer_engine import common, pytorch

# Below 2.7, from where on Megatron imports TE's MoE router kernels.
__version__ = "2.6.0"

__all__ = ["common", "pytorch"]
