"""mini, the small base that we train ourselves: architecture, data, training and its command line."""
