"""What an exported engine is, and how one is run. Never imports torch; names are imported from its modules."""
