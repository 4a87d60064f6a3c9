"""Results as tables, comparisons and one HTML page."""
