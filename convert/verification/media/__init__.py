"""Image and video files, and conversations about them, that artifacts are verified with."""
