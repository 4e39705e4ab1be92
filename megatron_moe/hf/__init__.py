"""Read the shape and slices of a dense model in a Hugging Face folder, and write such folders."""
