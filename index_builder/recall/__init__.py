"""What a search misses: calibration, measurement, certificate."""
