"""Quantisation: what a precision means, and the codes and scales that come of it."""
