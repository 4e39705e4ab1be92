"""Faults that ``make chaos`` injects into training jobs, by what they hit."""
