"""`python -m sfpo_megatron ...` and `torchrun -m sfpo_megatron ...`."""

from sfpo_megatron.cli import main

if (
    __name__ == "__main__"
):  # dist-checkpoint writers and reward workers spawn: they import this file
    raise SystemExit(main())
