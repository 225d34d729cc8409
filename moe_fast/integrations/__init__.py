"""Connects moe_fast to libraries outside its core dependencies; modules name their extras."""
