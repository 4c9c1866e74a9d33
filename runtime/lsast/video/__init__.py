"""Videos: decoding and encoding, and frames that follow each other."""
