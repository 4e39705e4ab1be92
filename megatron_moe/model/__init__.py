"""The model: Megatron-Core's GPTModel, built empty, filled online from the dense checkpoint."""
