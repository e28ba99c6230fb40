"""`sfpo-megatron eval`: models on held-out problems."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial

from sfpo_megatron.commands.starting import check_and_warn, see_to_home
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.origin import COMMAND_LINE
from sfpo_megatron.evaluation.records import EvaluationError
from sfpo_megatron.evaluation.request import Request, request_of
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.holder import require_writable


def run(arguments: argparse.Namespace) -> int:
    """Make the request, check it, and evaluate in a process of its own; the exit code."""
    try:
        request = request_of(arguments)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = arguments.config or COMMAND_LINE
    for model in request.models:
        config = replace(request.config, model=replace(request.config.model, path=str(model.hf)))
        # A checkpoint has its weights elsewhere, in files that its manifest vouches for.
        has_weights = model.checkpoint is None
        check_and_warn(config, file, world_size=1, for_training=has_weights, only_reads=True)
    see_to_home()
    if not request.config.data.eval:
        raise ConfigError(
            file,
            "data.eval",
            found="no source",
            expected="held-out prompts",
            fix="add a source, or give --data",
        )
    from sfpo_megatron.launcher.supervise import supervise

    require_writable(RunDirectory.of(request.config.output_dir))
    return supervise(partial(_evaluate, request))


def _evaluate(request: Request) -> int:
    from sfpo_megatron import evaluate
    from sfpo_megatron.launcher.rank import exit_code_of, install_signal_handlers, message_line

    install_signal_handlers(0)
    try:
        evaluate.run(request)
    except Exception as error:
        print(message_line(error, 0), file=sys.stderr, flush=True)
        return 2 if isinstance(error, EvaluationError) else exit_code_of(error)
    return 0
