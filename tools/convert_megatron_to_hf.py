"""Convert a Megatron checkpoint (torch_dist) to a Hugging Face directory: one process, no GPU.

    python tools/convert_megatron_to_hf.py --checkpoint runs/x/checkpoints --out hf

--checkpoint: one of the trainer or of Megatron-LM, or a folder of several, of which the newest is
taken. docs/converters.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def num_bytes(text: str) -> int:
    """`5GB`, `500MiB` or a plain number."""
    match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", text)
    if match is None or match.group(2).upper() not in _UNITS or int(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 5GB")
    return int(match.group(1)) * _UNITS[match.group(2).upper()]


def main(argv: list[str] | None = None) -> int:
    from sfpo_megatron.config.paths import path_from_option

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=path_from_option, required=True, help="directory to read"
    )
    parser.add_argument("--out", type=path_from_option, required=True, help="directory to write")
    parser.add_argument(
        "--hf",
        type=path_from_option,
        help="has the model's config.json and tokenizer (default: found)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: kept")
    parser.add_argument("--max-shard-size", type=num_bytes, default=num_bytes("5GiB"))
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    arguments = parser.parse_args(argv)
    import torch

    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.convert.locate import hf_files, locate
    from sfpo_megatron.convert.to_hf import TOOL, megatron_to_hf
    from sfpo_megatron.families.shape import UnsupportedModel
    from sfpo_megatron.mcore.bridge import bridge_to_hf
    from sfpo_megatron.outputs.aside import writing

    try:
        try:
            megatron_to_hf(
                arguments.checkpoint,
                arguments.out,
                hf=arguments.hf,
                dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
                max_shard_bytes=arguments.max_shard_size,
                overwrite=arguments.overwrite,
            )
        except UnsupportedModel as error:
            hf = arguments.hf or hf_files(locate(arguments.checkpoint))
            with writing(
                arguments.out,
                tool=TOOL,
                inputs=(arguments.checkpoint, hf),
                overwrite=arguments.overwrite,
            ) as aside:
                bridge_to_hf(arguments.checkpoint, hf, aside, error)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
