"""The memory and speed model: what weights, cache, buffers and engines need."""
