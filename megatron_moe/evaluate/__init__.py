"""Evaluate a model: loss on held-out text, tasks of lm-evaluation-harness, generated text."""
