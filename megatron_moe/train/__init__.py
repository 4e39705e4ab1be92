"""Training: one step, its metrics, and the loop with its hooks."""
