"""The distribution ``mtl-sft``: the package ``mtl``, the command ``mtl`` and its configs.

``conf/`` stands at the top of the repository for people to read and is installed as the package ``mtl.conf``.
"""

from pathlib import Path

from setuptools import find_packages, setup

SLURM = ["hydra-submitit-launcher>=1.2,<2"]
JOBLIB = ["hydra-joblib-launcher>=1.2,<2"]
OPTUNA = ["hydra-optuna-sweeper>=1.3,<2"]

setup(
    name="mtl-sft",
    version="0.1.0",
    description="Fine-tune one language model on many tasks at once so that every task ends up good",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",  # hydra-core 1.3 does not start on 3.14
    packages=[*find_packages(include=["mtl", "mtl.*"]), "mtl.conf"],
    package_dir={"mtl": "mtl", "mtl.conf": "conf"},
    package_data={
        "mtl": ["tasks/suite/*", "tasks/suite/*/*", "report/templates/*"],
        "mtl.conf": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.20,<6",
        "peft>=0.21,<0.22",
        "accelerate>=1.15,<2",
        "datasets>=5,<6",
        "hydra-core>=1.3.8,<1.4",
        "omegaconf>=2.3,<2.4",
        "numpy>=2",
        "tensorboard>=2.20",
        "safetensors>=0.5",
        "gguf>=0.17",
        "rich>=14",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "scikit-learn>=1.5",
        "sacrebleu>=2.5",
        "rouge-score>=0.1.2",
        "jiwer>=4",
    ],
    extras_require={
        "torchjd": ["torchjd>=0.18,<0.19"],
        "bench": ["trl>=1.16,<2", "torchjd>=0.18,<0.19"],
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "slurm": SLURM,
        "joblib": JOBLIB,
        "optuna": OPTUNA,
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "selenium>=4.30,<5",
            "ruff",
            "mypy",
            "psutil",
            "setuptools>=77",
            *SLURM,
            *JOBLIB,
            *OPTUNA,
        ],
    },
    entry_points={"console_scripts": ["mtl=mtl.cli:main"]},
)
