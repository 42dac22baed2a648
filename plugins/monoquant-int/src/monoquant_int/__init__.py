"""Integer quantization schemes for monoquant: int8, int4 and every width from 2 to 8."""
