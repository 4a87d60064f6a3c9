"""Calibration: conversations, and what the language model sees of them."""
