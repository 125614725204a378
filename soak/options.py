# SPDX-License-Identifier: MIT
"""For soak/interleave and soak/hostile as they were; goes when they no longer import it."""

from collections.abc import Callable
from typing import Any

from soak.cli import complain

__all__ = ["complain", "converter"]


def converter(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return the type itself."""
    return parse
