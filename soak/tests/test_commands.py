# SPDX-License-Identifier: MIT
"""The commands: options, files and exit codes; interrupts; what they measure, and how they judge it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import baseline, environment, run
from soak import verdict as judged
from soak.__main__ import COMMANDS, main
from soak.config import config_from
from soak.tests.helpers import OnTerminal, run_python

pytestmark = pytest.mark.usefixtures("no_thread_left")

QUICK = ("--producers", "2", "--baseline", "none", "--settings", "none", "--display", "none")
short_passes = pytest.mark.usefixtures("short_passes")


def soak(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run `soak run` in this process; return the exit code and the result."""
    code = main(["run", *QUICK, "--duration", "0.2s", "--out", str(folder), *options])
    return code, json.loads((folder / "latest.json").read_text(encoding="utf-8"))


# What a run says.


@short_passes
def test_a_run_loses_nothing_and_says_what_the_contract_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    code, result = soak(tmp_path, "--json", str(path))
    assert (code, result) == (0, json.loads(path.read_text(encoding="utf-8")))
    verdicts = ("correctness", "throughput", "memory", "drain", "overall")
    assert {name: finding.keys() for name, finding in result["verdict"].items()} == {
        name: {"status", "note"} for name in verdicts
    }
    keys = "delivered_per_second batches peak_heap_bytes peak_rss_bytes drain_seconds shutdown_seconds latency_seconds"
    assert set(f"{keys} calibration config environment".split()) <= set(result)
    assert result["delivered_bytes"] / result["delivered"] == pytest.approx(163, abs=3)  # web events
    assert result["latency_seconds"]["samples"] > 0
    samples = [json.loads(line) for line in (tmp_path / result["samples"]).read_text(encoding="utf-8").splitlines()]
    assert [sample["type"] for sample in samples[:2]] == ["header", "sample"]
    assert samples[-1]["delivered"] == result["delivered"]


OTHER_SETTINGS = [
    "--on-full raise --max-buffered-bytes 64KiB",
    "--bulk 50 --consumers 3 --display live",
    pytest.param("--payload 0 --max-batch-bytes none", marks=pytest.mark.slow),
    pytest.param("--payload 10KiB --on-full raise --bulk 20 --max-buffered-bytes 300KiB", marks=pytest.mark.slow),
]


@short_passes
@pytest.mark.parametrize("options", OTHER_SETTINGS)
def test_a_run_with_other_settings_loses_nothing(options: str, tmp_path: Path, capsys: Any) -> None:
    with mock.patch.dict(sys.modules, {"rich.console": None}):  # what cannot be shown is a line
        _, result = soak(tmp_path, *options.split())
    assert (result["lost"], result["duplicated"], result["problems"]) == (0, 0, [])
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"
    assert ("no live display" in capsys.readouterr().err) == ("live" in options)


@pytest.mark.parametrize(
    ("options", "code", "note"),
    [("--each 5", 0, "0 refused of 10,"), ("--each 1000000 --limit 50ms", 1, "not done within")],
)
def test_stress_that_is_not_done_in_time_fails(options: str, code: int, note: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "result.json"
    assert main(["stress", "--producers", "2", "--json", str(path), *options.split()]) == code
    assert note in capsys.readouterr().out
    assert json.loads(path.read_text(encoding="utf-8"))["delivered"] > 0


# Options.

BAD = {
    "run": "--duration=soon --duration=-5s --duration=5 --duration=1e3s --duration=0s --duration=inf"
    " --producers=0 --consumers=two --payload=heavy --payload=2147483648"
    " --payload=10KB --payload=1e3 --payload=-1 --payload=99999999999999GiB"
    " --interval=0s --max-batch-bytes=320kilo --max-buffered-bytes=1.5 --consumer-delay=10 --on-full=drop --bulk=1.5"
    " --sink=nowhere --sink=http:// --sink=file: --sink=file:x#stream=y"
    " --out= --json= --baseline=nobody's --settings=nowhere.json --display=hologram",
    "tune": "--probe=soon --payload=heavy",
    "stress": "--each=0 --limit=0",
    "baseline": "--runs=0 --name=auto",
    "bench": "--rounds=0 --groups=calls,nothing --compare=nobody's --record=a/b",
    "sinks": "--only=kafka --faults=fire",
    "instructions": "--record=perhaps",
    "report": "--run=",
}


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in BAD for option in BAD[name].split()])
def test_a_bad_option_is_one_line_that_names_it(command: str, option: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, option])
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    name, _, value = option.partition("=")
    assert (caught.value.code, told.out) == (2, "")
    assert f"argument {name}: " in line and value.rpartition(",")[2] in line


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"python3 -m soak {command}" in " ".join(capsys.readouterr().out.split("example", 1)[1].split())


# A full disk.

LIMITED = """
import resource, sys
from soak.__main__ import entry
from soak.config import Config

Config.pass_seconds = lambda *_: 0.1
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # the header has room, and the result has not
sys.exit(entry())
"""


def test_a_run_goes_on_when_the_disk_is_full_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_python("-c", LIMITED, "run", "--duration", "0.5s", *QUICK, "--out", str(tmp_path))
    result = json.loads(done.stdout)
    assert (done.returncode, result["interrupted"]) == (1, False)
    assert result["delivered"] == result["accepted"] > 0
    (samples,) = tmp_path.iterdir()  # and no part of a result
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("soak: ")]
    assert line.startswith(f"soak: cannot write {str(samples)!r}: ")
    assert line.endswith("; the result goes to stdout")
    assert json.loads(samples.read_text(encoding="utf-8").splitlines()[0])["type"] == "header"


# Interrupts.

INTERRUPTED = """
import os, sys, time, tempo
from soak import interrupts
from soak.__main__ import entry
from soak.config import Config

os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first of a session is the one that its keys are for
Config.pass_seconds = lambda *_: 0.1
flush, flushes, wanted = tempo.Dispatcher.flush, [], int(sys.argv.pop(1))

def slow_flush(self, timeout=None):
    flushes.append(1)
    if len(flushes) == 3:  # of the load, after those of heap and census
        for number in range(wanted):
            print(f"now: flush {number}", file=sys.stderr, flush=True)
            while interrupts._seen <= number:
                time.sleep(0.01)
    return flush(self, timeout)

tempo.Dispatcher.flush = slow_flush
sys.exit(entry())
"""
LIVE = "time left" if importlib.util.find_spec("rich") else "no live display"
RUN, FLUSH = "run --producers 2 --baseline none --settings none --duration", ["now: flush 0", "now: flush 1"]


@pytest.mark.parametrize(
    ("argv", "number", "words", "code"),
    [
        (f"{RUN} 10m", signal.SIGTERM, [LIVE], 0),
        pytest.param(f"{RUN} 10m", signal.SIGINT, [LIVE], 0, marks=pytest.mark.slow),
        pytest.param(f"{RUN} 10m", signal.SIGINT, ["calibration: "], 0, marks=pytest.mark.slow),
        (f"{RUN} 100ms", signal.SIGINT, FLUSH[:1], 0),
        (f"{RUN} 100ms", signal.SIGINT, FLUSH, 130),
        ("stress --each 1000000", signal.SIGINT, ["stress: 256 producers"], 0),
        ("tune", signal.SIGINT, ["payload size"], 130),
        ("tune --payload 64 --probe 50ms", signal.SIGINT, ["producers"], 130),
        ("baseline --producers 2", signal.SIGINT, ["calibration: "], 130),
    ],
)
def test_ctrl_c_ends_a_command_and_keeps_its_result_and_a_second_one_ends_it_at_once(
    argv: str, number: int, words: list[str], code: int, tmp_path: Path
) -> None:
    flushes = sum(some in FLUSH for some in words)
    with OnTerminal("-c", INTERRUPTED, str(flushes), *argv.split(), "--out", str(tmp_path)) as terminal:
        for some in words:
            terminal.read_until(some)
            terminal.interrupt(number)
        assert terminal.exit_code() == code, terminal.text
    assert ("interrupted" if code else "written ") in terminal.text.splitlines()[-1]
    assert "Traceback" not in terminal.text
    assert terminal.text.rfind("\x1b[?25h") >= terminal.text.rfind("\x1b[?25l")  # the cursor is shown again
    results = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")]
    assert bool(results) == (code == 0)
    for result in results:
        assert result["interrupted"] and result["accepted"] == result["delivered"] > 0


# tune and its settings; baselines; pi.


@short_passes
def test_what_tune_finds_is_what_a_run_uses_unless_an_option_says_otherwise(tmp_path: Path, capsys: Any) -> None:
    place = {**environment.describe(), "memory_bytes": 8 << 20}
    with mock.patch.object(environment, "describe", return_value=place):
        assert main(["tune", "--probe", "10ms", "--payload", "64", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(("CALIBRATED: ", "PROVISIONAL: "))
    share = re.search("([0-9.]+)% of 8", told)
    assert share is not None and 0.0 < float(share[1]) <= 12.5
    tuned = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["settings"]
    _, result = soak(tmp_path, "--settings", "auto", "--producers", "3")
    found = [result["config"][name] for name in ("payload", "producers", "max_buffered_bytes")]
    assert found == [64, 3, int(tuned["max_buffered_bytes"])]
    assert str(tmp_path / "settings.json") in capsys.readouterr().err


def test_a_recorded_baseline_is_found_by_machine_interpreter_and_settings(tmp_path: Path) -> None:
    place, ours = environment.describe(), asdict(config_from(argparse.Namespace(producers=2), 600.0))
    figures = {"ratio": 0.5, "peak_heap_bytes": 1000, "drain_seconds": 0.001, "delivered_per_second": 1.0}
    verdicts = {"overall": {"status": "pass", "note": ""}}
    result = {**figures, "calibration": 2.0, "verdict": verdicts, "interrupted": False, "config": ours}
    with mock.patch.object(run, "run", return_value=result):
        assert main(["baseline", "--runs", "2", "--producers", "2", "--out", str(tmp_path)]) == 0
    found, _ = baseline.choose("auto", ours, place, tmp_path)
    assert found is not None
    assert found.expected("ratio") == (found.name, 0.5, 0.025)
    for other in ({**ours, "producers": 3}, {**ours, "interval": 1.0}):
        assert baseline.choose("auto", other, place, tmp_path)[0] is None
    assert baseline.choose("auto", ours, {**place, "cores": 99}, tmp_path)[0] is None


PI = """
import shutil, sys
from pathlib import Path
from soak import environment, pi
from soak.__main__ import entry

machine, pi.CACHE = sys.argv.pop(1), Path("/nowhere")
environment.machine = lambda: machine
shutil.which = lambda *_, **__: None
sys.exit(entry())
"""


@pytest.mark.parametrize(
    ("machine", "code", "told"), [("Raspberry Pi 4", 0, "not emulated"), ("PC", 1, "soak: no apt-get here")]
)
def test_pi_runs_on_a_raspberry_pi_and_says_what_it_needs(machine: str, code: int, told: str, tmp_path: Path) -> None:
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path))
    done = run_python("-c", PI, machine, "pi", "stress", *options)
    assert done.returncode == code and told in done.stderr
    results = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()]
    assert [result["delivered"] for result in results] == ([] if code else [10])


# Verdicts.


def test_the_verdicts_fail_beyond_the_spread_of_the_baseline() -> None:
    known = ("board", 0.5, 0.1)
    assert [judged.judge_throughput(1.0, ratio, known).status for ratio in (0.41, 0.39)] == ["pass", "fail"]
    heap_known = ("board", 1000.0, 100.0)
    assert [judged.judge_memory(peak, 5000, 0, heap_known).status for peak in (1100, 1101)] == ["pass", "fail"]
    assert [judged.judge_memory(peak, 5000, 10).status for peak in (5000, 5010, 5011)] == ["pass", "warn", "fail"]
    assert judged.judge_memory(5011, 5000, 10, late=True).status == "warn"
    assert [judged.judge_drain(seconds, ("board", 0.01, 0.05)).status for seconds in (0.06, 0.07)] == ["pass", "fail"]
    assert [judged.judge_drain(seconds).status for seconds in (0.5, 0.6, 6.0, None)] == ["pass", "warn", "fail", "fail"]
    findings = {"a": judged.Finding("fail", ""), "b": judged.Finding("warn", "")}
    assert judged.overall(findings) == judged.Finding("fail", "a fail, b warn")
