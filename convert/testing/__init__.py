"""Random checkpoints, for tests and measurements."""
