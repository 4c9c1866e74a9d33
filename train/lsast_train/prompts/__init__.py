"""The prompt space, its generators and its file."""
