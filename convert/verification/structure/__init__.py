"""The graphs' structure and the manifest against the checkpoint's configuration."""
