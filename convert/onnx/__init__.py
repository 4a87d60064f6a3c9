"""ONNX graphs: built, read, cut, and compiled into engines."""
