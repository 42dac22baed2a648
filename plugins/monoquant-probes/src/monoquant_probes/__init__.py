"""Hardware and runtime probes for monoquant."""
