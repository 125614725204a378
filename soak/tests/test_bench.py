# SPDX-License-Identifier: MIT
"""The benchmark: its subjects do their work, its ratios are of one round, its comparison can fail."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import bench, benchmarks, instructions
from soak.__main__ import main
from soak.tests.helpers import run_python

pytestmark = pytest.mark.usefixtures("no_thread_left")
SUBJECTS = {name: subject for _, group in benchmarks.GROUPS.values() for name, subject in group.items()}


def suite(**rounds: list[list[float]]) -> Any:
    """A suite with the values of some rounds for each name."""
    pyperf = pytest.importorskip("pyperf")
    runs = {
        name: [pyperf.Run(values, metadata={"name": name}, collect_metadata=False) for values in of_it]
        for name, of_it in rounds.items()
    }
    return pyperf.BenchmarkSuite(list(map(pyperf.Benchmark, runs.values())))


def ratios(*values: float) -> Any:
    return suite(**{"a / b": [[value] for value in values]})


def test_every_row_of_the_benchmark_is_measured() -> None:
    soaks = {name + end for name in benchmarks.SOAKS for end in ("", "_bare")}
    assert {name for row in bench.ROWS for name in (row.subject, row.control)} == soaks | SUBJECTS.keys()


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_of_the_benchmark_does_its_work(name: str) -> None:
    if not benchmarks.available(name):
        pytest.skip(f"{benchmarks.PACKAGES[name]} is not installed")
    assert SUBJECTS[name]() > 0


def test_a_soak_of_the_benchmark_and_its_control_do_their_work() -> None:
    assert benchmarks.soak("soak_1", 0.1) > 0
    assert benchmarks.bare("soak_1", 0.1) > 0


def test_a_ratio_is_of_the_best_values_of_a_round_and_the_median_counts() -> None:
    measured = suite(a=[[4.0, 2.0, 3.0], [6.0], [40.0]], b=[[1.0], [2.0], [10.0]])
    with mock.patch.object(bench, "ROWS", (bench.Row("a / b", "a", "b"), bench.Row("none", "a", "c"))):
        found = bench.ratios_of(pytest.importorskip("pyperf"), measured)
        line = bench.table(measured, found).splitlines()[1]
    assert found.get_benchmark_names() == ["a / b"]
    assert found.get_benchmark("a / b").get_values() == (2.0, 3.0, 4.0)
    assert line.split() == ["a", "/", "b", "3", "1", "6.00", "s", "2.00", "s"]


def test_the_comparison_finds_what_is_worse_by_more_than_the_noise() -> None:
    before = ratios(1.9, 2.0, 2.1)
    assert bench.compare(before, ratios(2.3, 2.35, 2.4)) == bench.compare(before, ratios(1.0)) == []
    assert bench.compare(before, ratios(2.8, 2.85, 2.9)) == ["WORSE: a / b: 2.850 was 2.000 (noise 0.500)"]
    with pytest.raises(argparse.ArgumentTypeError, match="'nobody': there is no nobody"):
        bench.recorded("nobody")


@pytest.mark.slow
def test_the_bench_command_measures_records_and_compares(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("pyperf")
    options = ["bench", "--rounds", "1", "--groups", "calls", "--json", str(tmp_path / "bench.json")]
    with mock.patch.object(bench, "FOLDER", tmp_path):
        assert main([*options, "--record", "here"]) == 0
        assert main([*options, "--compare", "here"]) in (0, 1)  # one round on a busy machine
    told = capsys.readouterr().out
    assert "enqueue / queue.Queue.put" in told
    assert "| refusal / queue.Full" in told  # pyperf's own comparison
    assert "WORSE: " in told or "not worse than " in told


def test_without_pyperf_the_benchmark_says_what_to_do() -> None:
    done = run_python("-c", "import sys; sys.modules['pyperf'] = None; from soak.__main__ import main; main(['bench'])")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "bench needs pyperf" in line


def test_instructions_fail_when_there_are_more_than_recorded(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "instructions.json"
    codes = []
    with mock.patch.object(instructions, "FILE", path), mock.patch("shutil.which", return_value="valgrind"):
        for counted, record in ((1000.0, "no"), (1000.0, "yes"), (1019.0, "no"), (1021.0, "no")):
            with mock.patch.object(instructions, "count", return_value={"enqueue": counted}):
                codes.append(main(["instructions", "--record", record]))
    assert codes == [0, 0, 0, 1]
    assert "1,021 instructions a payload, recorded 1,000: MORE" in capsys.readouterr().out
    assert sys.version.split()[0] in path.read_text(encoding="utf-8")
