"""What `sfpo-megatron demo` has beside the trainer: config, problems, a tiny model, a look at it.

config.yaml is that of examples/demo/; the wheel carries it here.
"""

from pathlib import Path

CONFIG = Path(__file__).parent / "config.yaml"
RUN = "runs/demo"
"""Directory of everything that it makes, unless it is told another."""
