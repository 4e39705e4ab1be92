"""Calibration of the planner on published throughput, and the tables of docs/planning.md."""
