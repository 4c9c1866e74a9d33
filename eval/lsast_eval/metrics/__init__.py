"""The metrics, and the networks they need."""
