"""The policy in flax.linen: a DeepSeek-V3 decoder, or a dense one of Llama's kind."""
