"""Checkpoints: sharded, written atomically, and loadable under any layout."""
