"""Rules that a configuration must keep."""
