"""Convert a Hugging Face directory to a Megatron checkpoint (torch_dist): one process, no GPU.

    python tools/convert_hf_to_megatron.py --hf models/Qwen2.5-Math-7B --out ckpt --tp 4

Megatron loads the result under any layout. --tp, --pp and --ep decide how the vocabulary is padded,
how tensors are cut into chunks, and the arguments that are recorded. docs/converters.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from sfpo_megatron.config.paths import path_from_option

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", type=path_from_option, required=True, help="directory to read")
    parser.add_argument("--out", type=path_from_option, required=True, help="directory to write")
    for flag, text in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        parser.add_argument(f"--{flag}", type=int, default=1, help=f"{text}-parallel size")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was written, keep others' files"
    )
    arguments = parser.parse_args(argv)
    from sfpo_megatron.config.tree import ParallelConfig
    from sfpo_megatron.convert.to_megatron import TOOL, hf_to_megatron
    from sfpo_megatron.families.shape import UnsupportedModel
    from sfpo_megatron.mcore.bridge import bridge_to_megatron
    from sfpo_megatron.outputs.aside import writing

    try:
        parallel = ParallelConfig(tensor=arguments.tp, pipeline=arguments.pp, expert=arguments.ep)
        try:
            hf_to_megatron(arguments.hf, arguments.out, parallel, overwrite=arguments.overwrite)
        except UnsupportedModel as error:
            with writing(
                arguments.out, tool=TOOL, inputs=(arguments.hf,), overwrite=arguments.overwrite
            ) as aside:
                bridge_to_megatron(arguments.hf, aside, error)
    except (ValueError, OSError) as error:
        print(f"error: {arguments.hf}: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
