"""Writing an artifact: its parts, its card, and the folder that appears whole or not at all."""
