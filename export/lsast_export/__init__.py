"""From a trained base and prompts to a bundle and styles: what needs torch once, so that painting never does."""
