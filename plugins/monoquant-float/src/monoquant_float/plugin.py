"""What monoquant-float registers."""
