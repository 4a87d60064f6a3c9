"""Time and memory of artifacts, round by round."""
