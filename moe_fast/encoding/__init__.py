"""Texts to what an encoder takes: tokens, lengths, truncation, and which encoder it is."""
