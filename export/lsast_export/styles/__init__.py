"""From prompts to a style: keys and values of every cross-attention layer."""
