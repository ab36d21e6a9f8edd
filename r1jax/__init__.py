"""r1jax: DeepSeek-R1 (arXiv 2501.12948) in JAX, for a laptop and for a pod."""

__version__ = "0.1.0"
