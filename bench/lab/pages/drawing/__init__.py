"""Pages: drawn, and asked about."""
