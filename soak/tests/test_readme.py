# SPDX-License-Identifier: MIT
"""The READMEs: their examples run, and the doctests of the harness."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

import tempo
from soak import bench as soak_bench
from soak import charts as soak_charts
from soak import instructions as soak_instructions
from soak import record as soak_record
from soak import report as soak_report
from soak import spool as soak_spool
from soak import tune as soak_tune
from soak import units
from soak.tests.helpers import (
    ROOT,
    run_python,
    skip_what_is_not_installed,
)

pytestmark = pytest.mark.usefixtures("no_thread_left")


EXAMPLES = {
    f"{document}:{text.count(chr(10), 0, block.start()) + 1}": block[1]
    for document in ("README.md", "soak/README.md")
    for text in [(ROOT / document).read_text(encoding="utf-8")]
    for block in re.finditer(r"(?ms)^```python\n(.*?)^```", text)
}
"""By where they stand."""


@pytest.mark.parametrize(
    "module",
    [
        *(
            tempo,
            units,
            soak_bench,
            soak_charts,
            soak_report,
            soak_instructions,
        ),
        *(soak_record, soak_spool, soak_tune),
    ],
    ids=lambda module: module.__name__,
)
def test_the_doctests_run(module: Any) -> None:
    outcome = doctest.testmod(module)
    assert outcome.failed == 0
    assert outcome.attempted > 0


def test_both_readmes_have_examples() -> None:
    assert {place.partition(":")[0] for place in EXAMPLES} == {"README.md", "soak/README.md"}


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_readmes_example_runs(place: str, tmp_path: Path) -> None:
    skip_what_is_not_installed(EXAMPLES[place])
    done = run_python("-c", EXAMPLES[place], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_example_is_skipped_when_a_package_is_missing() -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        skip_what_is_not_installed("import tempo\nfrom no_such_package.part import name\n")
