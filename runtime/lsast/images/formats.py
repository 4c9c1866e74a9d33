"""The file suffixes of the pictures and videos that are read and written."""

from __future__ import annotations

WRITTEN_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
"""Suffixes of pictures that can be written; a source of another kind becomes a PNG."""

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
"""Suffixes of videos."""

WRITTEN_VIDEOS = frozenset({".m4v", ".mkv", ".mov", ".mp4"})
"""Suffixes of videos that can be written; a source of another kind becomes an MP4."""
