"""Checkpoints: sharded, complete or absent, loadable anywhere; and the export to Hugging Face."""
