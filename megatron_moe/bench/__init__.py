"""BENCH: timed steps, phases, collectives; one JSON record a run."""
