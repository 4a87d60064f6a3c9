"""Pages: pictures that the project draws, questions about them, and a model trained on them."""
