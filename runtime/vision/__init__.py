"""Vision towers: which one runs, and features of tiles and frames."""
