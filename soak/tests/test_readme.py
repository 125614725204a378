# SPDX-License-Identifier: MIT
"""The READMEs: their examples run as they are. And the doctests of the harness."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from soak.tests.helpers import ROOT, run_python

EXAMPLES = {
    f"{document}:{text.count(chr(10), 0, block.start()) + 1}": block[1]
    for document in ("README.md", "soak/README.md")
    for text in [(ROOT / document).read_text(encoding="utf-8")]
    for block in re.finditer(r"(?ms)^```python\n(.*?)^```", text)
}
"""By where they are."""


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "soak").rglob("*.py"))
    if path.parent.name != "tests" and "    >>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_doctests_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0
    assert outcome.attempted > 0


def test_both_readmes_have_examples() -> None:
    assert {place.partition(":")[0] for place in EXAMPLES} == {"README.md", "soak/README.md"}


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_readmes_example_runs(place: str, tmp_path: Path) -> None:
    done = run_python("-c", EXAMPLES[place], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
