"""Fine-tuning of learned prompts by a style loss on the paintings that they give."""
