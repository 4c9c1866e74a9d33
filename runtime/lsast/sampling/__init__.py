"""The sampling algorithm of the paper, and what wraps its parts."""
