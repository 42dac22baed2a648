"""ONNX models for monoquant: read, quantized, written, run by onnxruntime."""
