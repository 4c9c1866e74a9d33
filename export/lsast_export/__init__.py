"""Writes bundles and styles from a base and prompts; needs torch."""
