"""Whether the exported graphs compute what torch computes."""
