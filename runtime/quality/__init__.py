"""Quality: a file of questions, an artifact's answers to them, and how right they are."""
