"""The compressed-tensors and generic safetensors formats for monoquant."""
