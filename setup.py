import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: importing would need torch before anything is installed.
INIT = Path(__file__).parent / "megatron_safe" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE).group(1)
DATA = ["datasets>=4,<6", "pyarrow>=14", "datasketch>=1.6,<3"]

setup(
    name="megatron-safe",
    version=VERSION,
    description="Safe RLHF (Dai et al., 2023) at Megatron scale",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_safe", "megatron_safe.*"]), "megatron_safe.kernels"],
    package_data={"megatron_safe.evaluation": ["attacks.json"]},
    # A top-level package called `kernels` would overwrite the Hugging Face package of that name.
    package_dir={"megatron_safe.kernels": "kernels"},
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",  # exact: runtime/cpu.py and the checkpoints depend on its internals
        "numpy",
        "scipy>=1.10",  # the certificate's bounds
        "krippendorff>=0.8,<1",  # how far annotators agree
        "psutil",  # megatron-core's dist_checkpointing imports it and does not declare it
        "jsonargparse>=4.53",
        "docstring-parser>=0.17",  # field docstrings in --help; jsonargparse[signatures] would also bring type stubs
        "PyYAML",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "jinja2>=3.1.6",  # chat templates are programs from strangers, and older sandboxes have holes
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # datasets from 4 on runs no code that comes with a data set. datasketch: near duplicates, in tools alone.
        "data": DATA,
        "judges": ["openai>=3.50,<4"],  # a language model behind an endpoint as the judge
        # apex is not here: the package of that name on PyPI is another project. NVIDIA's images bring the real one,
        # and Megatron-Core prefers Transformer Engine's fused kernels to apex's anyway.
        "gpu": ["triton", "transformer-engine[pytorch]>=2.9,<2.12", "flash-attn"],
        # triton: its interpreter runs the kernels on a CPU; published for Linux only.
        # transformers: what our ids, logits and exported folders are compared with; it needs Python 3.11.
        "test": [
            *DATA,
            "pytest",
            "hypothesis",
            "ruff",
            "openai>=3.50,<4",
            "scikit-learn>=1.4,<2",  # the bag of words that examples/real-text compares with
            "triton; platform_system == 'Linux'",
            "transformers; python_version >= '3.11'",
        ],
    },
    entry_points={"console_scripts": ["megatron-safe = megatron_safe.cli:main"]},
)
