"""Tokenize text, mix domains, and build the batches of each rank."""
