# SPDX-License-Identifier: MIT
"""The walk of the interleavings: a sample of it holds, and it finds each broken twin.

TEMPO_SEED=N repeats a sample; `make interleave` walks all.
"""

from __future__ import annotations

import os
import random

import pytest

from soak.__main__ import main
from soak.interleave import command, twins
from soak.interleave.schedule import Schedule
from soak.tests.helpers import REPEAT

pytestmark = pytest.mark.skipif(not command.POSSIBLE, reason="this interpreter cannot stop a thread at a bytecode")


def test_a_seeded_sample_of_the_interleavings_holds(capsys: pytest.CaptureFixture[str]) -> None:
    seed = os.environ.get("TEMPO_SEED", str(random.randrange(1 << 32)))
    code = main(["interleave", "--seconds", str(15 * REPEAT), "--seed", seed])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("twin", twins.TWINS, ids=str)
def test_the_walk_finds_a_twin_that_is_broken(twin: twins.Twin) -> None:
    assert command.walk_one(twin)[1] != ""


def test_a_twin_whose_text_no_longer_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="twin 'outdated': 0 times"):
        twins.Twin("outdated", "", "no such line in tempo.py", "").source()


def test_the_walk_of_a_plan_stops_the_call_at_each_bytecode() -> None:
    plan = command.Plan(("stats", "enqueue"), "empty", consumer=False)
    outcomes = list(command.walk(Schedule(), plan))
    assert outcomes == [1] * (len(outcomes) - 1) + [0]
    nested = list(command.walk(Schedule(), plan._replace(nested=True)))  # only where a signal handler may run
    assert len(outcomes) > 100 > len(nested) > 50


def test_interleave_walks_the_plans_that_are_named_and_refuses_a_name_of_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["interleave", "--only", "interrupt inside stats in 'empty'"]) == 0
    assert "\n2 plans and twins, " in capsys.readouterr().out
    for options, why in (
        (["--only", "no such"], "is in the name of no plan"),
        (["--twins", "--seconds", "1"], "--twins"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["interleave", *options])
        assert (caught.value.code, why in capsys.readouterr().err) == (2, True)
