"""Tokenizer and chat template of a checkpoint, in the artifact's form."""
