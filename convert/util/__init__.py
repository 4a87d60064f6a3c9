"""Files, threads and progress of a conversion."""
