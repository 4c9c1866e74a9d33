"""Reading the weights that others wrote, in every layout they come in."""
