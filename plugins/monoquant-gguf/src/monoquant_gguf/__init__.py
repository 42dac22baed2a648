"""GGUF files for llama.cpp: quantization types, architectures and tokenizers."""
