"""Measures monoquant on this machine and writes docs/performance.md: ``python -m benchmarks``."""
