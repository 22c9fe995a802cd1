"""What comes after the cut: a network as an ONNX file, in int8, and how fast it is beside the dense one."""
