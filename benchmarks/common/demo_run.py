"""The demo's run, small enough for any machine: its data, and its model with random weights."""

from __future__ import annotations

from pathlib import Path


def demo_run(folder: Path) -> list[str]:
    """Make both in `folder`. Returns the demo's config file, and the overrides that name them and
    an output_dir in `folder`; later overrides take their place."""
    from sfpo_megatron.config.load import load_config
    from sfpo_megatron.demo import CONFIG
    from sfpo_megatron.demo.legs import write_data
    from sfpo_megatron.demo.tiny_model import DEMO, make_tiny_model

    overrides = [
        f"model.path={folder / 'model'}",
        f"data.train.0.path={folder / 'data' / 'legs-train.parquet'}",
        f"data.eval.0.path={folder / 'data' / 'legs-eval.parquet'}",
        f"output_dir={folder / 'run'}",
    ]
    write_data(folder / "data")
    config = load_config(str(CONFIG), overrides)
    make_tiny_model(config, folder / "model", DEMO, seed=0)
    return [str(CONFIG), *overrides]
