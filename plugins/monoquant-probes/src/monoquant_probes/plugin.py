"""What monoquant-probes registers."""
