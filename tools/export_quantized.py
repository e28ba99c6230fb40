"""Quantize a Hugging Face directory with NVIDIA's modelopt, for vLLM. Needs the extra [quant].

    python tools/export_quantized.py --hf runs/x/hf --out runs/x/fp8 --format fp8_per_channel

| format | weights, activations | calibration | vLLM runs it on |
|---|---|---|---|
| fp8 | FP8 a tensor, FP8 a tensor | texts | GPU |
| fp8_per_channel | FP8 a channel, FP8 a token | none | GPU, CPU |
| int4_awq | INT4 in blocks, none | texts | GPU |
| nvfp4 | FP4 in blocks, FP4 | texts; needs a GPU here | GPU |

The output is written aside and put in place whole. docs/converters.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
"""Name -> modelopt's configuration."""
_NO_CALIBRATION = ("fp8_per_channel",)


def main(argv: list[str] | None = None) -> int:
    from sfpo_megatron.config.paths import path_from_option

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", type=path_from_option, required=True, help="directory to read")
    parser.add_argument("--out", type=path_from_option, required=True, help="directory to write")
    parser.add_argument("--format", choices=tuple(FORMATS), required=True)
    parser.add_argument(
        "--calibration",
        type=path_from_option,
        help="jsonl with `prompt`: texts like those of the task",
    )
    parser.add_argument("--num-texts", type=int, default=128, help="of --calibration")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    arguments = parser.parse_args(argv)
    from sfpo_megatron.outputs.aside import writing

    try:
        texts = _texts(arguments.format, arguments.calibration, arguments.num_texts)
        with writing(
            arguments.out,
            tool="export_quantized",
            inputs=(arguments.hf,),
            overwrite=arguments.overwrite,
        ) as aside:
            export(arguments.hf, aside, arguments.format, texts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.out}")
    return 0


def _texts(name: str, file: Path | None, count: int) -> list[str]:
    if name in _NO_CALIBRATION:
        return []
    if file is None:
        raise ValueError(
            f"--format {name}: found no --calibration, expected a jsonl file with `prompt`; give "
            "one, or use fp8_per_channel, which needs none"
        )
    from sfpo_megatron.config.tree import DataSource
    from sfpo_megatron.data.rows import BadRows
    from sfpo_megatron.data.sources import source_rows

    source = DataSource(source="jsonl", path=str(file), size=count)
    rows = source_rows(source, seed=0, key="--calibration", name=file.stem)
    bad = BadRows("error")
    questions = [row.question for row in bad.good(rows, file.stem)]
    bad.settle()
    return questions


def export(hf: Path, out: Path, name: str, texts: list[str]) -> None:
    """Quantize `hf` into `out`; ValueError where modelopt or a GPU is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise ValueError(
            f"nvidia-modelopt: found none that works ({error}), expected it; "
            "pip install 'sfpo-megatron[quant]'"
        ) from error
    if name == "nvfp4" and not torch.cuda.is_available():
        raise ValueError("--format nvfp4: found no CUDA device, expected one; use another format")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).to(device)
    model = mtq.quantize(model, getattr(mtq, FORMATS[name]), _calibrate(tokenizer, texts))
    export_hf_checkpoint(model, export_dir=out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" not in config:
        raise ValueError(f"{out}: found no quantization_config, expected modelopt to write one")


def _calibrate(tokenizer: Any, texts: list[str]) -> Callable[[Any], None] | None:
    """What modelopt runs to see the activations."""
    if not texts:
        return None

    def run(model: Any) -> None:
        for text in texts:
            model(**tokenizer(text, return_tensors="pt").to(model.device))

    return run


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
