"""Integer codes of a language model: solved, stored or found in a checkpoint."""
