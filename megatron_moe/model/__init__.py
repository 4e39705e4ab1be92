"""The model: Megatron-Core's GPTModel, built empty and filled from the dense checkpoint."""
