"""What computes: ONNX Runtime, CUDA, TensorRT, and what they need of this process."""
