# SPDX-License-Identifier: MIT
"""The commands: options, files and exit codes; interrupts; what they measure, and how they judge it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soak import baseline, census, config, display, environment, heap, interrupts, payloads, pi, run, stress, tune
from soak import verdict as judged
from soak.__main__ import COMMANDS, main
from soak.calibration import calibrate
from soak.config import Config
from soak.drive import Crew, drive
from soak.load import Latencies, Load
from soak.tests.helpers import ENVIRONMENT, LIMIT, ROOT, OnTerminal, make, run_python
from soak.tests.test_report import WITHOUT_MATPLOTLIB, write_run

pytestmark = pytest.mark.usefixtures("no_thread_left")

QUICK = ("--producers", "2", "--baseline", "none", "--settings", "none", "--display", "none")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
short_passes = pytest.mark.usefixtures("short_passes")


def settings_of(**chosen: Any) -> Config:
    """The defaults of `run`, with some settings changed, for ten minutes."""
    return config.config_from(argparse.Namespace(**chosen), 600.0)


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
    samples = [json.loads(line) for line in (tmp_path / result["samples"]).read_text(encoding="utf-8").splitlines()]
    assert [sample["type"] for sample in samples[:2]] == ["header", "sample"]
    assert samples[-1]["delivered"] == result["delivered"]


OTHER_SETTINGS = [
    "--on-full raise --max-buffered-bytes 64KiB",
    "--bulk 50 --consumers 3",
    pytest.param("--payload 0 --max-batch-bytes none", marks=pytest.mark.slow),
    pytest.param("--payload 10KiB --on-full raise --bulk 20 --max-buffered-bytes 300KiB", marks=pytest.mark.slow),
]


@short_passes
@pytest.mark.parametrize("options", OTHER_SETTINGS)
def test_a_run_with_other_settings_loses_nothing(options: str, tmp_path: Path) -> None:
    _, result = soak(tmp_path, *options.split())
    assert (result["lost"], result["duplicated"], result["problems"]) == (0, 0, [])
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"


@short_passes
@pytest.mark.parametrize(
    ("changed", "code", "part", "status", "note"),
    [
        ((heap, "TRACED", False), 0, "memory", "warn", "not measured: this interpreter has no tracemalloc"),
        ((judged, "DRAIN_FAIL", -1.0), 1, "overall", "fail", "drain fail"),
    ],
    ids=["warn", "fail"],
)
def test_a_verdict_of_fail_is_exit_code_1_and_one_of_warn_is_not(
    changed: tuple[Any, str, Any], code: int, part: str, status: str, note: str, tmp_path: Path
) -> None:
    with mock.patch.object(*changed):
        found, result = soak(tmp_path)
    assert (found, result["verdict"][part]) == (code, {"status": status, "note": note})


def test_stress_that_is_not_done_in_time_fails() -> None:
    one = replace(settings_of(producers=2), duration=1.0)
    counted, _ = census.take(one, 5.0, each=10, every=0.001)
    assert stress.judge(one, counted, 20).status == "pass"
    late = stress.judge(one, counted, 21)
    assert (late.status, late.note.partition(";")[0]) == ("fail", "not done within 1.00 s: 20 of 21 payloads sent")
    with mock.patch.object(interrupts, "_seen", 1):
        assert stress.judge(one, counted, 21).status == "warn"


# Options.

BAD = {
    "run": "--duration=soon --duration=-5s --duration=5 --duration=1e3s --duration=0s --duration=inf"
    " --producers=0 --consumers=two --payload=heavy --payload=2147483648"
    " --payload=10KB --payload=1e3 --payload=-1 --payload=99999999999999GiB"
    " --interval=0s --max-batch-bytes=320kilo --max-buffered-bytes=1.5 --consumer-delay=10 --on-full=drop --bulk=1.5"
    " --sink=nowhere --out= --json= --baseline=nobody's --settings=nowhere.json --display=hologram",
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


# Files that cannot be written, and streams that are full.


def found_by_tune(*_: Any) -> tune.Found:
    return tune.Found(settings_of(), tune.Edge(1024, None), 1000.0, 1.0, [])


def ran_well(**changes: Any) -> dict[str, Any]:
    figures = {"ratio": 0.5, "peak_heap_bytes": 1000, "drain_seconds": 0.001, "delivered_per_second": 1.0}
    verdicts = {"overall": {"status": "pass", "note": ""}}
    rest = {"calibration": 2.0, "verdict": verdicts, "interrupted": False, "config": asdict(settings_of())}
    return {**figures, **rest, **changes}


WRITERS: dict[str, tuple[str, Any, str]] = {
    "run": (" ".join(["--duration 50ms", *QUICK, "--json"]), contextlib.nullcontext(), '"delivered": '),
    "tune": ("--payload 64 --out", mock.patch.object(tune, "tune", found_by_tune), "CALIB"),
    "stress": ("--producers 2 --each 5 --json", contextlib.nullcontext(), '"delivered": 10'),
    "baseline": ("--runs 1 --name board --out", mock.patch.object(run, "run", return_value=ran_well()), '"ratio": 0.5'),
    "report": ("--out", mock.patch.dict(sys.modules, WITHOUT_MATPLOTLIB), "PASS: well"),
    "sinks": ("--only null --duration 0.1s --producers 2 --json", contextlib.nullcontext(), '"rows": ['),
}
"""By command: its options before the path that it is given; what does its work; and a word of its results."""


@short_passes
@pytest.mark.parametrize("place", ["a file for a folder", pytest.param("a full disk", marks=needs_full)])
@pytest.mark.parametrize("command", WRITERS)
def test_a_command_whose_file_cannot_be_written_says_so_and_tells_what_it_found(
    command: str, place: str, tmp_path: Path, capsys: Any
) -> None:
    if command == "report":
        pytest.importorskip("jinja2")
    options, at_work, word = WRITERS[command]
    result = write_run(tmp_path)
    path = result / "deeper"
    if place == "a full disk":
        path = FULL
        if options.endswith("--out"):  # the file's name in it is the command's own
            path = tmp_path / "full"
            path.mkdir()
            for name in ("settings.json", "board.json", "report.html"):
                (path / name).symlink_to(FULL)
    more = ["--out", str(tmp_path)] if command in ("run", "stress", "sinks") else []
    more = ["--run", str(result)] if command == "report" else more
    with at_work:
        assert main([command, *more, *options.split(), str(path)]) == 1
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "cannot write" in line]
    assert line.startswith("soak: ") and str(path) in line and word in told.out
    assert re.search("No space left on device" if place == "a full disk" else "directory|exists", line)


LIMITED = """
import resource, sys
from soak.__main__ import entry
from soak.config import Config

Config.pass_seconds = lambda *_: 0.1
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # the header has room, and the result has not
sys.exit(entry())
"""


def test_a_run_goes_on_when_the_disk_is_full_and_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = run_python("-c", LIMITED, "run", "--duration", "0.5s", *QUICK, "--out", str(tmp_path))
    result = json.loads(done.stdout)
    assert (done.returncode, result["interrupted"]) == (1, False)
    assert result["delivered"] == result["accepted"] > 0
    (samples,) = tmp_path.iterdir()  # and no part of a result
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("soak: ")]
    assert line.startswith(f"soak: cannot write {str(samples)!r}: ")
    assert line.endswith("; the result goes to stdout")
    assert json.loads(samples.read_text(encoding="utf-8").splitlines()[0])["type"] == "header"


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("full", ["stderr", "stdout"])
def test_a_stream_that_is_full_does_not_change_what_a_command_comes_to(
    full: str, unbuffered: str, tmp_path: Path
) -> None:
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "soak", "stress", "--producers", "2", "--out", str(tmp_path)]
    variables = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    codes = {"--each 5": 0, "--each 0": 2, "--each 1000000 --limit 1ms": 1} if full == "stderr" else {"--each 5": 1}
    for options, code in codes.items():
        with FULL.open("w") as streams[full]:
            done = subprocess.run(
                [*command, *options.split()], cwd=ROOT, env=variables, text=True, timeout=60, check=False, **streams
            )
        assert done.returncode == code
    assert full == "stderr" or done.stderr.splitlines()[1:] == ["soak: cannot write to stdout: No space left on device"]


# Interrupts.

INTERRUPTED = """
import os, sys, time

os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first of a session is the one that its keys are for

import tempo
from soak import census, heap, interrupts, run, tune
from soak.__main__ import entry
from soak.config import Config

phase = sys.argv.pop(1)
Config.pass_seconds = lambda *_: 0.1
flush, flushes = tempo.Dispatcher.flush, []

def announce(module, name):
    work = getattr(module, name)
    def announced(config, seconds, *rest, **more):
        global phase
        if name == phase:
            phase, seconds = "", 600.0
            print(f"now: {name}", file=sys.stderr, flush=True)
        return work(config, seconds, *rest, **more)
    setattr(module, name, announced)

def slow_flush(self, timeout=None):
    flushes.append(1)
    if phase.startswith("flush") and len(flushes) == 4:  # of the load, after those of calibration, heap and census
        for number in range(int(phase[5:])):
            print(f"now: flush{number}", file=sys.stderr, flush=True)
            while interrupts._seen <= number:
                time.sleep(0.01)
    return flush(self, timeout)

announce(run, "calibrate")
announce(heap, "measure")
announce(census, "take")
announce(tune, "drive")
tempo.Dispatcher.flush = slow_flush
sys.exit(entry())
"""
LIVE = "time left" if importlib.util.find_spec("rich") else "no live display"


@contextlib.contextmanager
def interrupted(phase: str, *argv: str, code: int) -> Iterator[OnTerminal]:
    """Run a command, to be interrupted; nothing goes wrong on its terminal, and the cursor is shown again."""
    with OnTerminal("-c", INTERRUPTED, phase, *argv) as terminal:
        yield terminal
        assert terminal.exit_code() == code, terminal.text
    assert "Traceback" not in terminal.text
    assert terminal.text.rfind("\x1b[?25h") >= terminal.text.rfind("\x1b[?25l")


PHASES = {
    "calibrate": "now: calibrate",
    "measure": "now: measure",
    "take": "now: take",
    "load": LIVE,
    "flush1": "now: flush0",
}
SLOW = [
    pytest.param(phase, signal.SIGINT, marks=pytest.mark.slow) for phase in ("calibrate", "measure", "take", "load")
]


@pytest.mark.parametrize(
    ("phase", "number"),
    [("load", signal.SIGTERM), ("flush1", signal.SIGINT), *SLOW],
)
def test_ctrl_c_in_each_part_of_a_run_ends_the_load_and_keeps_the_result(
    phase: str, number: int, tmp_path: Path
) -> None:
    options = f"--producers 2 --out {tmp_path} --baseline none --settings none --duration"
    duration = "10m" if phase != "flush1" else "100ms"
    with interrupted(phase, "run", *options.split(), duration, code=0) as terminal:
        terminal.read_until(PHASES[phase])
        terminal.interrupt(number)
    assert "(interrupted: the load lasted " in terminal.text
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert result["interrupted"] and result["drain_seconds"] is not None
    assert result["accepted"] == result["delivered"] > 0


NOTHING = "soak: interrupted: there is no result"


@pytest.mark.parametrize(
    ("argv", "phase", "words", "code", "last"),
    [
        ("tune", "", ["payload size"], 130, NOTHING),
        ("tune --payload 64", "drive", ["now: drive"], 130, NOTHING),
        ("baseline --producers 2", "calibrate", ["now: calibrate"], 130, NOTHING),
        ("stress --each 1000000", "", ["stress: 256 producers"], 0, "written       "),
        (
            "run --producers 2 --duration 100ms --settings none",
            "flush2",
            ["now: flush0", "now: flush1"],
            130,
            NOTHING,
        ),
    ],
    ids=["tune asking", "tune", "baseline", "stress", "a run a second time"],
)
def test_ctrl_c_in_another_command_or_a_second_time_is_told_in_a_line(
    argv: str, phase: str, words: list[str], code: int, last: str, tmp_path: Path
) -> None:
    with interrupted(phase, *argv.split(), "--out", str(tmp_path), code=code) as terminal:
        for some in words:
            terminal.read_until(some)
            terminal.interrupt()
    assert last in terminal.text.splitlines()[-1]
    assert argv.startswith("run") or len(list(tmp_path.iterdir())) == (code == 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_not_kept_from_another_handler(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with interrupts.kept():
            signal.raise_signal(number)
            assert not interrupts.seen()
    finally:
        signal.signal(number, before)
    assert came == [1]


@pytest.mark.parametrize("work", ["calibrate", "drive"])
def test_an_interrupt_ends_a_pass(work: str) -> None:
    one = settings_of(producers=2)
    load = Load(one)

    with interrupts.kept():
        signal.raise_signal(signal.SIGINT)
        drive(one, 600.0, load) if work == "drive" else calibrate(one, 600.0)
        assert interrupts.seen()
        assert work == "calibrate" or load.delivered == sum(load.accepted) > 0  # there is time to show that events flow


def signal_whose_wake_up_is_lost() -> bool:
    """Have SIGINT come in another thread than the main one; return whether that sees it all the same."""
    time.sleep(0.1)  # so that it waits
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    end = time.monotonic() + LIMIT / 2
    while not interrupts._seen and time.monotonic() < end:
        time.sleep(0.01)
    return interrupts._seen == 1


def test_an_interrupt_whose_wake_up_is_lost_is_seen_in_a_wait_all_the_same() -> None:
    crew, event = Crew(), threading.Event()
    crew.go.set()
    with interrupts.kept():
        assert crew.call(signal_whose_wake_up_is_lost, LIMIT)[0] is True
    with interrupts.kept():
        thread = threading.Thread(target=signal_whose_wake_up_is_lost)
        thread.start()
        with pytest.raises(interrupts.Interrupted):
            interrupts.wait(event, LIMIT)
        thread.join(LIMIT)


# tune and its settings; baselines; pi.


def test_what_tune_finds_is_what_a_run_uses_unless_an_option_says_otherwise(tmp_path: Path, capsys: Any) -> None:
    assert main(["tune", "--probe", "10ms", "--payload", "64", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(("CALIBRATED: ", "PROVISIONAL: "))
    assert told.endswith(f"settings.json: a run with --out {tmp_path} uses them from now on\n")
    tuned = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["settings"]
    chosen = argparse.Namespace(settings=Path("auto"), out=tmp_path, duration=1.0, sink="null", producers=3)
    one, note = run.configure(chosen, environment.describe())
    assert (one.payload, one.producers, str(one.max_buffered_bytes)) == (64, 3, tuned["max_buffered_bytes"])
    assert str(one.max_batch_bytes).lower() == tuned["max_batch_bytes"]
    assert str(tmp_path / "settings.json") in note
    assert run.configure(chosen, {**environment.describe(), "cores": 99})[0].payload == "telemetry"
    chosen.settings = Path("none")
    assert run.configure(chosen, {})[0].payload == "telemetry"


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', '{"settings": {"nobody": "1"}, "environment": {}}'])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        config.read_file(path, {})


@settings(deadline=None)
@given(memory=st.one_of(st.none(), st.integers(1 << 20, 1 << 50)), size=st.integers(0, 1 << 20))
def test_tune_never_recommends_more_than_an_eighth_of_the_memory(memory: int | None, size: int) -> None:
    one = settings_of(payload=size, max_buffered_bytes=1 << 20)
    most = tune.largest_buffer(one, memory)
    within = heap.bound(replace(one, producers=32, max_buffered_bytes=most)) <= (memory or 512 << 20) // 8
    assert within or most == 1  # not even one byte: then it recommends nothing


def test_tune_asks_until_the_answer_is_a_payload_size(capsys: Any) -> None:
    answers = iter(["heavy\n", "10KiB\n"])
    assert tune.ask(lambda: next(answers)) == 10 * 1024
    assert "'heavy' is not a size" in capsys.readouterr().err
    assert tune.ask(lambda: "") == tune.ask(lambda: "heavy") == "telemetry"


def test_a_recorded_baseline_is_found_by_machine_interpreter_and_settings(tmp_path: Path) -> None:
    place, ours = environment.describe(), asdict(settings_of(producers=2))
    with mock.patch.object(run, "run", return_value=ran_well(config=ours)):
        assert main(["baseline", "--runs", "2", "--producers", "2", "--out", str(tmp_path)]) == 0
    found, _ = baseline.choose("auto", ours, place, tmp_path)
    assert found is not None
    assert found.expected("ratio") == (found.name, 0.5, 0.025)
    for other in ({**ours, "producers": 3}, {**ours, "interval": 1.0}):
        assert baseline.choose("auto", other, place, tmp_path)[0] is None


ON_A_PI = """
import sys
from soak import environment
from soak.__main__ import main

environment.machine = lambda: "Raspberry Pi 4 Model B Rev 1.4"
main(sys.argv[1:])
"""


def test_pi_on_a_raspberry_pi_runs_there(tmp_path: Path) -> None:
    done = run_python("-c", ON_A_PI, "pi", "stress", "--producers", "2", "--each", "5", "--out", str(tmp_path))
    assert done.returncode == 0 and "not emulated" in done.stderr
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(encoding="utf-8"))["delivered"] == 10


@pytest.mark.parametrize("tool", [None, "/a/tool"])
def test_pi_without_tools_or_without_a_place_for_them_says_so(tool: str | None, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "pi"
    with mock.patch.object(pi, "CACHE", cache), mock.patch.object(shutil, "which", return_value=tool):
        assert main(["pi"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    why = "no apt-get here: what is missing" if tool is None else f"cannot write '{cache}"
    assert line.startswith(f"soak: {why}")


EMULATED = """
import os, sys
from soak import pi

os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first of a session is the one that its keys are for
# It takes longer to end than subprocess.run() would wait until it kills.
ends = "trap 'sleep 0.5; echo ended well; exit 7' INT TERM; sleep 0.3; echo now: emulated; while :; do sleep 0.1; done"
sys.exit(pi.run(["sh", "-c", ends], dict(os.environ)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_pi_lets_what_is_emulated_end_in_its_own_way(number: int) -> None:
    with OnTerminal("-c", EMULATED) as terminal:
        terminal.read_until("now: emulated")
        terminal.interrupt(number)
        assert terminal.exit_code() == 7, terminal.text
    assert "ended well" in terminal.text and "Traceback" not in terminal.text


# What is sent, seen and judged.


@pytest.mark.parametrize("size", [None, 0, 1, 14, 15, 34, 35, 64, 10240])
def test_events_have_their_size_and_one_of_a_stride_is_a_probe(size: int | None) -> None:
    sent = payloads.Sent(size)
    events = list(islice(payloads.events(size, 7, sent), 3000))
    if size is None:
        assert sum(map(len, events)) / len(events) == pytest.approx(payloads.MEAN, abs=1)
        assert max(map(len, events)) == payloads.LARGEST
    else:
        assert set(map(len, events)) == {size}
    probes = [i for i, event in enumerate(events) if payloads.MARK in event]
    assert probes == ([0, 1024, 2048] if size is None or size >= payloads.PROBED_SIZE else [])
    assert sent.probes == len(probes)


def test_the_latencies_shown_are_those_counted() -> None:
    latencies = Latencies()
    for nanoseconds in [-5, 0, 99, 128, 5_123_456, 5_100_001, 10**12]:
        latencies.add(nanoseconds)
    shown: dict[str, Any] = latencies.as_json()
    assert (shown["p50"], shown["p99"], shown["max"], shown["samples"]) == (128e-9, 1000.0, 1000.0, 7)
    assert Latencies().as_json() == {"p50": None, "p99": None, "max": None, "samples": 0}


@pytest.mark.parametrize(("show", "lines"), [("live", 3), ("plain", 2), ("auto", 2), ("none", 0)])
def test_a_run_without_rich_shows_plain_lines(show: str, lines: int, capsys: Any) -> None:
    without = mock.patch.dict(sys.modules, {"rich.console": None})
    with without, make() as d, display.Monitor(show, settings_of(), None, 1.0) as monitor:
        for elapsed in (0.5, 1.0):
            monitor.sample(elapsed, d.stats())
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_verdict_on_correctness_fails_by_any_error() -> None:
    clean: dict[str, Any] = {"problems": [], "lost": 0, "duplicated": 0, "rejected": 0, "on_full": "block"}
    assert judged.judge_correctness(**clean).status == "pass"
    assert judged.judge_correctness(**{**clean, "rejected": 1, "on_full": "raise"}).status == "pass"
    for wrong in ({"lost": 1}, {"duplicated": 1}, {"rejected": 1}, {"problems": ["a consumer raised"]}):
        assert judged.judge_correctness(**{**clean, **wrong}).status == "fail"


def test_the_verdicts_on_ratio_heap_and_drain_fail_beyond_the_spread_of_the_baseline() -> None:
    known = ("board", 0.5, 0.1)
    assert [judged.judge_throughput(1.0, ratio, known).status for ratio in (0.41, 0.39)] == ["pass", "fail"]
    assert judged.judge_throughput(0.0, None, None).status == "fail"
    heap_known = ("board", 1000.0, 100.0)
    assert [judged.judge_memory(peak, 5000, 0, heap_known).status for peak in (1100, 1101)] == ["pass", "fail"]
    assert [judged.judge_memory(peak, 5000, 10).status for peak in (5000, 5010, 5011)] == ["pass", "warn", "fail"]
    drain = ("board", 0.01, 0.05)
    note = "drained in 70.0 ms: above the baseline board: 10.0 ms +- 50.0 ms"
    assert judged.judge_drain(0.06, drain).status == "pass"
    assert judged.judge_drain(0.07, drain) == judged.Finding("fail", note)
    without = [judged.judge_drain(seconds).status for seconds in (0.5, 0.6, 6.0, None)]
    assert without == ["pass", "warn", "fail", "fail"]
    poor, bad = judged.Finding("warn", ""), judged.Finding("fail", "")
    assert judged.overall({"a": bad, "b": poor}) == judged.Finding("fail", "a fail, b warn")
