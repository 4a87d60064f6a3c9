"""Checkpoints: found, opened, checked, read tensor by tensor."""
