"""What a run is: frozen sections, read from YAML and ``key.path=value`` overrides."""
