"""Stage 5, DATA: text to tokens, tokens to the batches of each rank."""
