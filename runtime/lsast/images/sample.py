"""The picture that shows what styles look like, on the server's cards and on the sheet of styles."""

from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parent / "sample.webp"

THUMBNAIL: dict[str, Any] = {"size": 256, "steps": 10, "solver": "unipc", "seed": 0}
"""Options of its paintings."""
