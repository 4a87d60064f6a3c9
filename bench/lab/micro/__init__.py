"""Single choices measured: drafts, reuse, the loop, the tower."""
