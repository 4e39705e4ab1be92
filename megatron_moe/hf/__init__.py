"""Hugging Face folders: what a dense model is, slices of its tensors, and writing one back."""
