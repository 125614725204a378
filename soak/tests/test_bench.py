# SPDX-License-Identifier: MIT
"""The benchmark: its subjects do their work, its ratios are right, its comparison can fail."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import bench as soak_bench
from soak import handover as soak_handover
from soak import micro as soak_micro
from soak import payloads as soak_payloads
from soak import rows as soak_rows
from soak import worker as soak_worker

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_every_row_of_the_benchmark_is_measured_by_its_group() -> None:
    micro = set(soak_micro.subjects())
    handover = {*soak_handover.subjects(), *soak_handover.PEERS}
    for row in soak_rows.ROWS:
        for name in filter(None, (row.subject, row.control)):
            if row.group in ("micro", "handover"):
                assert name in (micro if row.group == "micro" else handover), row
            elif row.group in ("scaling", *soak_rows.SOAKS):
                stem = re.sub("_(bare|drain|shutdown|slowest)$", "", name)
                assert stem in soak_rows.SOAKS or stem in soak_rows.SCALING, row


def test_the_subjects_of_the_benchmark_do_their_work() -> None:
    for name, measure in {**soak_micro.subjects(), **soak_handover.subjects()}.items():
        assert measure() > 0, name


def test_a_soak_of_the_benchmark_gives_a_value_for_each_of_its_rows() -> None:
    values = soak_worker.soak("soak_32", soak_rows.soak_config(producers=3), 0.1, turns=2)
    assert {name.removeprefix("soak_32") for name in values} == {"", "_bare", "_drain", "_shutdown", "_slowest"}
    assert all(len(found) == 1 and found[0] > 0 for found in values.values())


@pytest.mark.parametrize("size", [None, 35, 10240])
def test_soak_events_without_probes_are_the_same_but_for_the_probes(size: int | None) -> None:
    sent = soak_payloads.Sent(size)
    probed, plain = (list(islice(soak_payloads.events(size, 7, counter), 3000)) for counter in (sent, None))
    identity = slice(*(soak_payloads.identity_start(size) + place for place in (0, soak_payloads.IDENTITY_SIZE)))
    assert [event[identity] for event in probed] == [event[identity] for event in plain]
    assert [i for i, event in enumerate(probed) if soak_payloads.MARK in event] == [63, 191, 447, 959, 1983]
    assert sent.probes == 5
    assert not any(soak_payloads.MARK in event for event in plain)


ROW = soak_rows.Row("a / b", "", "micro", "a", "b", 2.0)


SHARE = soak_rows.Row("a : b", "", "micro", "a", "b", 0.5, least=True, best=False)


def test_a_ratio_is_taken_within_a_round_and_the_median_of_the_rounds_counts() -> None:
    rounds = [{"a": [4.0, 2.0], "b": [1.0, 2.0]}, {"a": [6.0], "b": [2.0]}, {"a": [40.0], "b": [10.0]}]
    assert soak_bench.evaluate(ROW, rounds) == (3.0, 1.0, 6.0, 2.0)
    assert soak_bench.evaluate(SHARE, rounds) == pytest.approx((1 / 3, (0.4 - 0.25) / 2, 6.0, 2.0))
    assert soak_bench.evaluate(ROW, [{"a": [1.0]}]) is None
    assert soak_bench.evaluate(ROW, []) is None


def test_the_comparison_finds_what_is_worse_by_more_than_the_noise() -> None:
    with mock.patch.object(soak_bench, "ROWS", (ROW, SHARE)):
        recorded = {"a / b": (2.0, 0.1), "a : b": (0.5, 0.02), "gone": (1.0, 0.0)}
        same = soak_bench.compare({"a / b": (2.35, 0.1, 0, 0), "a : b": (0.43, 0.02, 0, 0)}, recorded)
        better = soak_bench.compare({"a / b": (1.0, 0.0, 0, 0), "a : b": (0.9, 0.0, 0, 0)}, recorded)
        worse = soak_bench.compare({"a / b": (2.37, 0.1, 0, 0), "a : b": (0.41, 0.02, 0, 0)}, recorded)
    assert same == better == []
    assert [line.split(":")[0].split(" /")[0] for line in worse] == ["a", "a "]


def test_the_table_says_which_target_is_missed() -> None:
    place = {"machine": "m", "cores": 2, "interpreter": "i", "python": "p", "build": "b", "commit": None}
    with mock.patch.object(soak_bench, "ROWS", (ROW, SHARE)):
        text = soak_bench.table({"a / b": (2.5, 0.1, 1e-7, 2e-7), "a : b": (0.6, 0.1, 1e-7, 2e-7)}, place)
    missed, met = text.splitlines()[1:3]
    assert "MISSED" in missed and "100 ns" in missed
    assert " met " in met


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Any:
        raise ImportError

    with (
        mock.patch.dict(soak_handover.PEERS, {"peer": ("a-package", missing)}, clear=True),
        mock.patch.object(soak_worker, "_in_turns", side_effect=lambda subjects, turns: sorted(subjects)),
    ):
        names: Any = soak_worker.run_handover(1.0)

    assert "peer is left out: a-package is not installed" in capsys.readouterr().err
    assert names == sorted(soak_handover.subjects())


def test_compare_takes_the_baseline_of_the_machine_that_was_about_as_fast(tmp_path: Path) -> None:
    for name, seconds in (("cpython-3.99", 8e-7), ("cpython-3.99-fast", 3e-7)):
        rows = {"soak_32": {"ratio": 0.5, "spread": 0.01, "control": seconds}, "other": {"ratio": 1.0, "spread": 0.0}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    own = mock.patch.object(soak_bench, "_own_name", return_value="cpython-3.99")
    with mock.patch.object(soak_bench, "FOLDER", tmp_path), own:
        recorded = soak_bench._parse_baselines("auto")
        (named,) = soak_bench._parse_baselines("cpython-3.99-fast")
        with pytest.raises(ValueError, match="no baseline nobody"):
            soak_bench._parse_baselines("nobody")
    figures = {"soak_32": (0.5, 0.01, 6e-7, 3.1e-7)}
    assert soak_bench.nearest(figures, recorded) == named
    assert soak_bench.nearest({"soak_32": (0.5, 0.01, 9e-7, 7e-7)}, recorded).name == "cpython-3.99"
    assert soak_bench.nearest({"other": (1.0, 0.0, 1e-7, 1e-7)}, recorded).name == "cpython-3.99"
