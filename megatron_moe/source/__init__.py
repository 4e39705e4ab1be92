"""Models that a run starts from."""
