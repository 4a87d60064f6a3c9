"""Makes artifacts out of checkpoints. The heavy half: torch, transformers, onnx-ir."""
