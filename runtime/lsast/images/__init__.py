"""The picture around the algorithm: canvas, mask, preview, metadata."""
