"""What monoquant-int registers."""
