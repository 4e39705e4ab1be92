"""Dense models that a run starts from."""
