"""Says what an artifact costs: memory, time, quality."""
