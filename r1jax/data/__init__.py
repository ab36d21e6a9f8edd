"""Tokenizer, problems, and the miniature's tasks and corpus."""
