"""Opens artifacts and answers from them. No torch, no transformers, no onnx."""
