"""What the decoder reads: rows of text and of image features."""
