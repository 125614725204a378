# SPDX-License-Identifier: MIT
"""For soak/interleave and soak/hostile as they were; goes when they no longer import it."""

from soak.cli import count
from soak.cli import duration as parse_duration

__all__ = ["parse_count", "parse_duration"]


def parse_count(text: str, *, most: int) -> int:
    """Return a whole number from 1 to ``most``."""
    return count(most)(text)
