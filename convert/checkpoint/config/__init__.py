"""Configuration files of a checkpoint, in one form."""
