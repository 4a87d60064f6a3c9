"""Text: prompt format, tokenizer, and text from ids as they come."""
