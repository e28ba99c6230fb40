"""The weights that an engine starts with: the files that the trainer reads, and no others.

vLLM's own loader takes consolidated*.safetensors where there are such, else every *.safetensors
that no index leaves out, an adapter's or another precision's too.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sfpo_megatron.families.weight_files import INDEX, weight_files
from sfpo_megatron.host.start_stages import begin_stage


class ListedWeights(DefaultModelLoader):
    """vLLM's loader over `weight_files`."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the model, and say so in the engine's log."""
        begin_stage("loading weights")
        super().load_weights(model, model_config)
        begin_stage("measuring memory and compiling")

    def _prepare_weights(
        self,
        model_name_or_path: str,
        subfolder: str | None,
        revision: str | None,
        fall_back_to_pt: bool,
        allow_patterns_overrides: list[str] | None,
    ) -> tuple[str, list[str], bool, str]:
        """(folder, files, whether they are safetensors, name of the index), as vLLM asks for."""
        files = weight_files(Path(model_name_or_path))
        return model_name_or_path, [str(path) for path in files.paths], True, INDEX
