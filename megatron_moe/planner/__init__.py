"""Stage 9, PLAN: parameters, FLOPs, memory, time and the best layout, by arithmetic alone."""
