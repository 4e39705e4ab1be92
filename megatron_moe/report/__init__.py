"""Build self-contained HTML reports of runs."""
