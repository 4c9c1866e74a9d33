"""Painting over HTTP: a page, an API, and a worker process that paints; `lsast-serve` starts it."""
