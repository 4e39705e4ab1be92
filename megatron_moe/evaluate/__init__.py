"""How good a model is: loss on held-out text, tasks of the harness, and what it says."""
