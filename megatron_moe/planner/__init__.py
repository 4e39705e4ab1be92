"""Predict parameters, FLOPs, memory, step time and the best layout by arithmetic alone."""
