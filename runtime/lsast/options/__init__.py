"""What a caller may set, and where the defaults come from."""
