"""Checks of tools/gpu_check.py, by theme."""
