"""Experiments on real data with committed results; they take longer than a test."""
