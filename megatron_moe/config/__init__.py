"""Settings of a run: frozen sections, read from YAML and ``key.path=value`` overrides."""
