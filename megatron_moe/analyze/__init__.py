"""Analyze how the routers of a trained model route text, and how its experts have diverged."""
