"""Say what a checkpoint is, whether it is whole, and how it differs from another.

    python tools/inspect_checkpoint.py runs/x/checkpoints
    python tools/inspect_checkpoint.py runs/x/checkpoints --diff models/start

Both may be checkpoints of the trainer or of Megatron-LM or Hugging Face directories. With --diff
the exit code is 1 where a tensor differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from sfpo_megatron.config.paths import path_from_option

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=path_from_option)
    parser.add_argument(
        "--diff", type=path_from_option, metavar="OTHER", help="compare, tensor by tensor"
    )
    parser.add_argument(
        "--hf", type=path_from_option, help="has the model's config.json (default: found)"
    )
    arguments = parser.parse_args(argv)
    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.convert.inspect import describe, differences

    try:
        if arguments.diff is None:
            for label, text in describe(arguments.directory):
                print(f"{label:16} {text}")
            return 0
        found = 0
        for line in differences(arguments.directory, arguments.diff, hf=arguments.hf):
            print(line)
            found += 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{found} tensors differ" if found else "equal, bit for bit")
    return int(found > 0)


if __name__ == "__main__":
    # Run from a checkout as a script, so that the package need not be installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    raise SystemExit(main())
