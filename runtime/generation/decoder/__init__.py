"""The decoder: KV cache, steps, drafts and the choice of tokens."""
