#!/usr/bin/env bash
# What a run on GPUs needs, into the environment of PYTHON, and this checkout on top of it:
#
#   PYTHON=.venv/bin/python requirements/gpu.sh [--dry-run] [--pip]
#
# By uv where it is found, else by pip. In order: the locked versions, TransformerEngine's extension
# (built against the torch that is there by then), whether they load, this checkout.
set -euo pipefail
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if uv --version > /dev/null 2>&1 && [[ " $* " != *" --pip "* ]]; then
  CHECKOUT=(uv pip install --python "$PYTHON")
else
  CHECKOUT=("$PYTHON" -m pip install -q --disable-pip-version-check)
fi
CHECKOUT+=(--no-deps --no-build-isolation -e "$HERE")

PYTHONPATH=$HERE "$PYTHON" -m sfpo_megatron.commands.install gpu "$@"
if [[ " $* " == *" --dry-run "* ]]; then
  printf '# this checkout\n%s\n' "${CHECKOUT[*]@Q}"
else
  "${CHECKOUT[@]}"
fi
