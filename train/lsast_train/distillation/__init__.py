"""Guidance distillation: one pass of the U-Net instead of two."""
