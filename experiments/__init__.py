"""Experiments with committed results: real data, longer than a test."""
