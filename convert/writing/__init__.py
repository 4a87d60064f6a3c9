"""The parts of an artifact, its manifest and its card."""
