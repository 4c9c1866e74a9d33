"""Open engines and styles, shared by threads, batches and event loops."""
