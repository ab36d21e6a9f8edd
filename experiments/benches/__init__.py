"""Benchmarks, one a file; experiments/bench.py runs them."""
