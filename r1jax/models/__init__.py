"""The policy: a DeepSeek-V3 decoder (arXiv 2412.19437) in flax.linen."""
