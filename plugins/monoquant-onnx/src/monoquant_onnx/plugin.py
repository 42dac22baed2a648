"""What monoquant-onnx registers."""
