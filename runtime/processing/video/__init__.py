"""Videos: frames chosen, decoded, resized and normalised."""
