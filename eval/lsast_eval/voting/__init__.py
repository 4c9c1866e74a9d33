"""Blind votes: the web page and the win rates."""
