"""What travels in an artifact for the self-test: prompts, files and cases of the loop."""
