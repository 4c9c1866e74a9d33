"""One module for each inference library that runs a graph."""
