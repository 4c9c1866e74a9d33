"""What is on disk: a bundle with its manifest, graph specifications and styles."""
