"""The `trace` section of the config."""

from __future__ import annotations

from dataclasses import dataclass

from sfpo_megatron.config.fields import FieldError


@dataclass(kw_only=True, frozen=True, slots=True)
class TraceConfig:
    """Pictures of single train steps over all processes of the run (docs/trace.md)."""

    steps: tuple[int, ...] = ()
    """Train steps that are drawn, as output_dir/trace/step_0000005.json for Perfetto."""
    torch_profiler: bool = False
    """Write also what torch.profiler sees of these steps, a file a rank."""

    def __post_init__(self) -> None:
        for step in self.steps:
            if step < 1:
                raise FieldError("steps", list(self.steps), "numbers >= 1", "remove the others")
        if self.torch_profiler and not self.steps:
            raise FieldError("torch_profiler", True, "false without steps", "name steps")
