"""Calibrators for monoquant: from observed activations to ranges."""
