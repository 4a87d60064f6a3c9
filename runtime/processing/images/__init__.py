"""Images: opened within limits, cut into tiles, normalised."""
