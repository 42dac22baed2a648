"""monoquant: quantize any PyTorch model and export it to the file its runtime loads."""

__version__ = "0.1.0"
