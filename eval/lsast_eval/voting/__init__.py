"""Blind votes: the page and the counting."""
