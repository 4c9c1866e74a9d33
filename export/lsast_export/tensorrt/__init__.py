"""Compiles a bundle's graphs into TensorRT engines."""
