"""Formats of quantised weights: codes, scales and their layouts."""
