"""The self-test: an artifact checked where it runs, without its checkpoint."""
