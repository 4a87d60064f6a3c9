"""Quantised weights as the verifier computes them, without the quantiser's code."""
