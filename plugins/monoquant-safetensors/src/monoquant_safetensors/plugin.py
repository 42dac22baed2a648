"""What monoquant-safetensors registers."""
