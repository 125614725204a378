# SPDX-License-Identifier: MIT
"""The walk of the interleavings: a sample of it holds, and it finds each broken twin.

TEMPO_SEED=N repeats a sample; `make interleave` walks all.
"""

from __future__ import annotations

import os
import random

import pytest

from soak import __main__ as soak
from soak.interleave import command, twins, walk
from soak.interleave.schedule import Schedule

pytestmark = pytest.mark.skipif(not command.POSSIBLE, reason="this interpreter cannot stop a thread at a bytecode")
SECONDS = 15.0 * float(os.environ.get("REPEAT", "1"))


def test_a_seeded_sample_of_the_interleavings_holds(capsys: pytest.CaptureFixture[str]) -> None:
    seed = os.environ.get("TEMPO_SEED", str(random.randrange(1 << 32)))
    code = soak.main(["interleave", "--seconds", str(SECONDS), "--seed", seed])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("twin", twins.TWINS, ids=lambda twin: str(twin.name))
def test_the_walk_finds_a_twin_that_is_broken(twin: twins.Twin) -> None:
    assert twins.find(twin)[1] is not None


def test_a_twin_whose_text_no_longer_fits_is_an_error() -> None:
    twin = twins.Twin("outdated", "", "no such line in tempo.py", "")
    with pytest.raises(ValueError, match="twin 'outdated': 0 times"):
        twin.source()


def test_the_walk_of_a_plan_stops_the_call_at_each_bytecode() -> None:
    plan = walk.Plan(("stats", "enqueue"), "empty", consumer=False, nested=True)
    outcomes = list(walk.walk(Schedule(), plan))
    assert outcomes == [1] * (len(outcomes) - 1) + [0]
    assert len(outcomes) > 100


def test_interleave_walks_the_plans_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["interleave", "--only", "interrupt inside stats in 'empty'"]) == 0
    assert "nested               2 plans" in capsys.readouterr().out


def test_interleave_refuses_a_name_of_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak.main(["interleave", "--only", "no such plan"])
    assert caught.value.code == 2
    assert "'no such plan' is in the name of no plan" in capsys.readouterr().err
