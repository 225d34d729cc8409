"""Turns texts into vectors: models, tokens, lengths, truncation, prompts and domains."""
