"""Checkpoints of the Hugging Face hub: what is fetched, and what that needs."""
