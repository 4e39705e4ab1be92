"""JUDGE: what the routers of a trained model do with text, and what became of its experts."""
