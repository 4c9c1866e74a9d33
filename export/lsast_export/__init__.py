"""Exports a trained base and prompts to a bundle and styles, the only steps that need torch."""
