"""The small model: architecture, training, checkpoint."""
