"""Loading: options, placement, what fits the memory, and the parts of a loaded artifact."""
