"""Rules that a configuration must satisfy."""
