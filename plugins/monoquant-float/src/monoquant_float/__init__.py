"""Float quantization schemes for monoquant: fp8 and casts."""
