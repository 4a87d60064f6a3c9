"""Tokenizers compared: definitions, ids and texts."""
