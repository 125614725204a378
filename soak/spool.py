# SPDX-License-Identifier: MIT
"""For README.md, which still imports the spool from here: it is in soak/recipes/."""

from soak.recipes.spool import Spool, SpoolError, SpoolFull

__all__ = ["Spool", "SpoolError", "SpoolFull"]
