"""Verifying an artifact against its checkpoint."""
