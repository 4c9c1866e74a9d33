"""The frozen base: networks, attention by layer group, keys and values."""
