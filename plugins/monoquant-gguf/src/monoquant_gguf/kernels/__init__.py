"""How values become codes: llama.cpp's choices to the bit, and better ones."""
