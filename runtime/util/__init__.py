"""Small parts without knowledge of models: files, JSON, limits, allocation."""
