"""Training: one step, its numbers, and the loop with its hooks."""
