"""Writing bundles, adding graphs to them, checking them."""
