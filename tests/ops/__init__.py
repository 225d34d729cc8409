"""Tests of the ops against an independent implementation that loops over tokens."""
