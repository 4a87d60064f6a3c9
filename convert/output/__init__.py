"""The output folder: an artifact appears whole or not at all."""
