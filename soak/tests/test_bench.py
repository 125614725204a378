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


def ratios(*values: float) -> Any:
    """What a benchmark has measured."""
    pyperf = pytest.importorskip("pyperf")
    runs = [pyperf.Run([value], metadata={"name": "a / b"}, collect_metadata=False) for value in values]
    return pyperf.BenchmarkSuite([pyperf.Benchmark(runs)])


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_of_the_benchmark_does_its_work(name: str) -> None:
    if not benchmarks.available(name):
        pytest.skip(f"{benchmarks.PACKAGES[name]} is not installed")
    assert SUBJECTS[name]() > 0


def test_a_soak_of_the_benchmark_and_its_control_do_their_work() -> None:
    assert benchmarks.soak("soak_1", 0.1) > 0
    assert benchmarks.bare("soak_1", 0.1) > 0


def test_the_comparison_finds_what_is_worse_by_more_than_the_noise() -> None:
    before = ratios(1.9, 2.0, 2.1)
    assert bench.compare(before, ratios(2.3, 9.0, 9.0)) == bench.compare(before, ratios(1.0)) == []
    assert bench.compare(before, ratios(2.4, 2.5, 2.5)) == ["WORSE: a / b: 2.400 at best, was 2.100 at worst"]
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
