"""What monoquant-calibration registers."""
