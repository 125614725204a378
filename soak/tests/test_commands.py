# SPDX-License-Identifier: MIT
"""The commands: options, files, exit codes, interrupts; what they measure and how they judge it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soak import __main__ as soak_main
from soak import baseline as soak_baseline
from soak import bench as soak_bench
from soak import census as soak_census
from soak import environment as soak_environment
from soak import heap as soak_heap
from soak import instructions as soak_instructions
from soak import interrupts as soak_interrupts
from soak import payloads as soak_payloads
from soak import pi as soak_pi
from soak import progress as soak_progress
from soak import run as soak_run
from soak import settings as soak_settings
from soak import stress as soak_stress
from soak import tune as soak_tune
from soak import units, verdict
from soak import worker as soak_worker
from soak.calibration import calibrate
from soak.config import Config
from soak.drive import drive
from soak.load import Load
from soak.sinks import command as soak_sinks_command
from soak.tests.helpers import (
    ROOT,
    OnTerminal,
    make,
    run_python,
)
from soak.tests.test_report import WITHOUT_MATPLOTLIB, write_run

pytestmark = pytest.mark.usefixtures("no_thread_left")
CPYTHON = sys.implementation.name == "cpython"
walkable = pytest.mark.skipif(
    not CPYTHON or sys.version_info[:2] == (3, 12),
    reason="threads stopped at bytecodes crash CPython 3.12, are no PyPy's",
)


def soak(tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run `python3 -m soak run` with a few threads; return the process and its result."""
    path = tmp_path / "result.json"
    common = ("--producers", "4", "--out", str(tmp_path / "out"), "--json", str(path), "--baseline", "none")
    done = run_python("-m", "soak", "run", *common, *options, cwd=ROOT)
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_a_soak_of_a_second_loses_nothing(tmp_path: Path) -> None:
    done, result = soak(tmp_path, "--duration", "1s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["lost"] == result["duplicated"] == result["rejected"] == 0
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"
    assert {
        *("delivered_per_second", "batches", "peak_heap_bytes", "peak_rss_bytes", "drain_seconds", "shutdown_seconds"),
        *("latency_seconds", "calibration", "config", "environment"),
    } <= set(result)
    assert set(result["verdict"]) == {"correctness", "throughput", "memory", "drain", "overall"}


def test_a_soak_that_drops_what_is_refused_loses_nothing_of_what_was_accepted(tmp_path: Path) -> None:
    done, result = soak(tmp_path, "--duration", "0.3s", "--on-full", "raise", "--max-buffered-bytes", "64KiB")
    assert result["lost"] == result["duplicated"] == 0, done.stdout + done.stderr
    assert result["accepted"] == result["delivered"] > 0
    assert result["verdict"]["correctness"]["status"] == "pass"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--duration", "soon"),
        ("--duration", "-5s"),
        ("--producers", "0"),
        ("--consumers", "two"),
        ("--payload", "heavy"),
        ("--interval", "0s"),
        ("--max-batch-bytes", "320kilo"),
        ("--max-buffered-bytes", "1.5"),
        ("--consumer-delay", "10"),
        ("--on-full", "drop"),
        ("--bulk", "1.5"),
        ("--sink", "nowhere"),
        ("--out", ""),
        ("--json", ""),
        ("--baseline", "nobody's"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(option: str, value: str) -> None:
    done = run_python("-m", "soak", "run", option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rounds", "0"),
        ("--duration", "soon"),
        ("--groups", "micro,nothing"),
        ("--compare", "nobody's"),
        ("--record", "a/b"),
    ],
)
def test_a_bad_option_of_the_benchmark_is_one_line_that_names_it(option: str, value: str) -> None:
    done = run_python("-m", "soak", "bench", option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value.partition(",")[2] or value in line


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("run", "--settings", "nowhere.json"),
        ("run", "--display", "hologram"),
        ("tune", "--probe", "soon"),
        ("tune", "--payload", "heavy"),
        ("stress", "--each", "0"),
        ("stress", "--limit", "0"),
        ("baseline", "--runs", "0"),
        ("baseline", "--name", "auto"),
    ],
)
def test_a_bad_option_of_another_command_is_one_line_that_names_it(command: str, option: str, value: str) -> None:
    done = run_python("-m", "soak", command, option, value, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {option}: " in line
    assert value in line


@pytest.mark.parametrize(
    "command",
    ["run", "tune", "stress", "baseline", "report", "pi", "bench", "interleave"],
)
def test_each_command_of_soak_has_help_with_an_example(command: str) -> None:
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()) as out:
        soak_main.main([command, "--help"])
    assert caught.value.code == 0
    assert f"python3 -m soak {command}" in " ".join(out.getvalue().split("example", 1)[1].split())


def test_a_soak_stress_delivers_each_payload_of_each_producer(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_python(
        *("-m", "soak", "stress", "--producers", "8", "--each", "301", "--bulk", "4"),
        *("--out", str(tmp_path), "--json", str(path)),
        cwd=ROOT,
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["accepted"] == result["delivered"] == result["wanted"] == 8 * 301
    assert result["verdict"]["overall"]["status"] == "pass"


def test_a_soak_result_that_cannot_be_written_goes_to_stdout(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path / "file"))
    done = run_python("-m", "soak", "stress", *options, cwd=ROOT)

    assert done.returncode == 1
    assert json.loads(done.stdout)["delivered"] == 10
    assert "the result goes to stdout" in done.stderr
    assert "Traceback" not in done.stderr


FULL = """
import resource, sys
from soak.__main__ import entry
from soak.config import Config

Config.pass_seconds = lambda *_: 0.1
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # the header has room, and the result has not
sys.exit(entry())
"""


def test_a_soak_goes_on_when_the_disk_is_full_and_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    options = ("--duration", "0.5s", "--producers", "2", "--display", "none", "--out", str(tmp_path))
    done = run_python("-c", FULL, "run", *options, "--baseline", "none", cwd=ROOT)

    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["delivered"] == result["accepted"] > 0
    assert not result["interrupted"]
    assert result["load_seconds"] > 0.4
    (samples,) = tmp_path.iterdir()  # and no part of a result
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("soak: ")]
    assert line.startswith(f"soak: cannot write {str(samples)!r}: ")
    assert line.endswith("; the result goes to stdout")
    assert "Traceback" not in done.stderr
    assert json.loads(samples.read_text(encoding="utf-8").splitlines()[0])["type"] == "header"


def test_a_line_that_stderr_has_no_room_for_does_not_end_a_soak(tmp_path: Path) -> None:
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path), "--json", str(tmp_path / "result.json"))
    with open("/dev/full", "w", encoding="utf-8") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "soak", "stress", *options], cwd=ROOT, stderr=full_disk, timeout=60, check=False
        )
    assert done.returncode == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["delivered"] == 10


def test_a_soak_whose_summary_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    options = ("--producers", "2", "--each", "5", "--out", str(tmp_path))
    with open("/dev/full", "w", encoding="utf-8") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "soak", "stress", *options],
            cwd=ROOT,
            stdout=full_disk,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["soak: cannot write to stdout: No space left on device"]


BOARD = {"machine": "a board", "cores": 4, "interpreter": "CPython 3.11", "memory_bytes": 1 << 30, "commit": None}
BOARD.update(python="3.11.2", build="main")


def found_by_tune(*_: Any) -> soak_tune.Found:
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    return soak_tune.Found(config, soak_tune.Edge(1024, None), 1000.0, 1.0, [])


def ran_well() -> dict[str, Any]:
    figures = {"ratio": 0.5, "peak_heap_bytes": 9, "drain_seconds": 0.1, "delivered_per_second": 1.0, "calibration": 2}
    verdicts = {"overall": {"status": "pass", "note": ""}}
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    return {**figures, "verdict": verdicts, "interrupted": False, "config": config.as_json()}


WRITERS: dict[str, tuple[list[str], Callable[[], Any], str]] = {
    "run": (
        ["run", "--duration", "50ms", "--producers", "2", "--display", "none", "--baseline", "none", "--json"],
        lambda: mock.patch.object(Config, "pass_seconds", return_value=0.05),
        '"delivered": ',
    ),
    "tune": (
        ["tune", "--payload", "64", "--out"],
        lambda: mock.patch.object(soak_tune, "tune", found_by_tune),
        "CALIBRATED",
    ),
    "stress": (["stress", "--producers", "2", "--each", "5", "--json"], contextlib.nullcontext, '"delivered": 10'),
    "baseline": (
        ["baseline", "--runs", "1", "--name", "board", "--out"],
        lambda: mock.patch.object(soak_run, "run", return_value=ran_well()),
        '"ratio": 0.5',
    ),
    "bench": (
        ["bench", "--rounds", "1", "--groups", "micro", "--json"],
        lambda: mock.patch.multiple(soak_bench, _work=lambda *_, **__: {}, _suite=NoRoom),
        "row ",
    ),
    "report": (["report", "--html"], lambda: mock.patch.dict(sys.modules, WITHOUT_MATPLOTLIB), "PASS: well"),
    "sinks": (
        ["sinks", "--only", "null", "--duration", "100ms", "--producers", "2", "--json"],
        lambda: mock.patch.object(soak_sinks_command, "ROUNDS", 1),
        '"rows": [',
    ),
    "instructions": (
        ["instructions", "--record", "yes"],
        lambda: mock.patch.multiple(
            soak_instructions, count=lambda: {"enqueue": 1000.0}, shutil=mock.Mock(**{"which.return_value": "valgrind"})
        ),
        "1,000 instructions a payload",
    ),
}


class NoRoom:
    """In place of pyperf's suite: writes a line where it is told to."""

    def __init__(self, *_: Any) -> None:
        pass

    def dump(self, path: str, replace: bool) -> None:
        Path(path).write_text("a suite", encoding="utf-8")


@pytest.mark.parametrize("place", ["a file for a folder", "a full disk"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_command_of_soak_whose_file_cannot_be_written_says_so_and_tells_what_it_found(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "bench":
        pytest.importorskip("pyperf")
    argv, at_work, word = WRITERS[command]
    result = write_run(tmp_path)
    path = Path("/dev/full")
    if place == "a file for a folder":
        path = result / "deeper"
    elif argv[-1] == "--out":
        # The file's name in the folder is the command's affair.
        folder = tmp_path / "full"
        folder.mkdir()
        for name in ("settings.json", "board.json"):
            (folder / name).symlink_to(path)
        path = folder
    if command in ("run", "stress"):
        argv = [argv[0], "--out", str(tmp_path), *argv[1:]]
    if command == "report":
        argv = [argv[0], "--run", str(result), "--png", str(tmp_path / "made.png"), *argv[1:]]
    if command == "instructions":  # it reads the file first, and a full disk has no end
        if place == "a full disk":
            (tmp_path / "figures.json.part").symlink_to(path)
            path = tmp_path / "figures.json"
        monkeypatch.setattr(soak_instructions, "FILE", path)
    else:
        argv = [*argv, str(path)]
    with at_work():
        assert soak_main.main(argv) == 1

    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "cannot write" in line]
    assert line.startswith("soak: ")
    assert str(path) in line
    assert ("No space left on device" if place == "a full disk" else "directory") in line or "exists" in line
    assert word in told.out


def test_soak_settings_that_cannot_be_written_leave_those_of_before_whole(tmp_path: Path) -> None:
    soak_settings.write(tmp_path, {"producers": "7"}, BOARD, True, "today")
    with mock.patch.object(Path, "write_bytes", side_effect=OSError), pytest.raises(OSError):
        soak_settings.write(tmp_path, {"producers": "8"}, BOARD, True, "today")
    assert soak_settings.read(tmp_path / "settings.json", BOARD)[0] == {"producers": "7"}


def test_soak_pi_without_a_place_for_its_packages_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with (
        mock.patch.object(soak_pi, "CACHE", tmp_path / "file" / "pi"),
        mock.patch.object(shutil, "which", return_value="/a/tool"),
    ):
        assert soak_main.main(["pi"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"soak: cannot write {str(tmp_path / 'file' / 'pi')!r}: Not a directory; nothing can be emulated"


INTERRUPTED = """
import os, sys, time

os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first of a session is the one that its keys are for

import tempo
from soak import census, heap, interrupts, run, tune
from soak.__main__ import entry
from soak.config import Config

LONG = 600.0
phase = sys.argv.pop(1)
Config.pass_seconds = lambda *_: 0.1
flush = tempo.Dispatcher.flush

def say(words):
    print(words, file=sys.stderr, flush=True)

def announce(module, name):
    work = getattr(module, name)
    def announced(config, seconds, *rest, **more):
        global phase
        if name == phase:
            phase, seconds = "", LONG
            say(f"now: {name}")
        return work(config, seconds, *rest, **more)
    setattr(module, name, announced)

def slow_flush(self, timeout=None):
    global phase
    if phase.startswith("flush"):
        wanted, phase = int(phase[5:]), ""
        for number in range(wanted):
            say(f"now: flush{number}")
            while interrupts._seen <= number:
                time.sleep(0.01)
    return flush(self, timeout)

if phase == "load" or phase.startswith("flush"):  # those before are not what this is about
    before, phase = phase, ""
    take = census.take
    def last_before(*arguments, **more):
        global phase
        try:
            return take(*arguments, **more)
        finally:
            phase = before
    census.take = last_before

announce(run, "calibrate")
announce(heap, "measure")
announce(census, "take")
announce(tune, "drive")
tempo.Dispatcher.flush = slow_flush
sys.exit(entry())
"""


try:
    import rich  # noqa: F401
except ImportError:
    LIVE = "no live display"
else:
    LIVE = "time left"


def assert_restored(text: str) -> None:
    """Nothing went wrong on a terminal, and its cursor is shown again."""
    assert "Traceback" not in text
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")


@pytest.mark.parametrize("phase", ["calibrate", "measure", "take", "load", "flush1"])
def test_ctrl_c_in_each_part_of_a_soak_ends_the_load_and_keeps_the_result(phase: str, tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--baseline", "none", "--settings", "none")
    duration = ("--duration", "10m" if phase != "flush1" else "100ms")
    with OnTerminal("-c", INTERRUPTED, phase, "run", *options, *duration) as terminal:
        terminal.read_until({"load": LIVE, "flush1": "now: flush0"}.get(phase, f"now: {phase}"))
        terminal.interrupt()
        assert terminal.exit_code() == 0, terminal.text
    assert "(interrupted: the load lasted " in terminal.text
    assert "\x1b[?25l" in terminal.text or LIVE != "time left"
    assert_restored(terminal.text)
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert result["interrupted"]
    assert result["accepted"] == result["delivered"] > 0
    assert result["drain_seconds"] is not None


def test_sigterm_in_a_soak_is_as_ctrl_c(tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--baseline", "none", "--settings", "none")
    with OnTerminal("-c", INTERRUPTED, "load", "run", *options, "--duration", "10m") as terminal:
        terminal.read_until(LIVE)
        terminal.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 0, terminal.text
    assert_restored(terminal.text)
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert result["interrupted"]
    assert result["accepted"] == result["delivered"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_not_kept_from_whoever_looks_after_it(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        with soak_interrupts.kept():
            signal.raise_signal(number)
            assert not soak_interrupts.take()
    finally:
        signal.signal(number, before)
    assert came == [1]


def test_afterwards_interrupts_are_as_they_were_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert soak_interrupts.take()
        assert not soak_interrupts.take()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_before_a_soak_leaves_it_the_time_to_show_that_events_flow() -> None:
    config = soak_settings.config_from(argparse.Namespace(producers=2), 600.0)
    load = Load(config)
    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGINT)
        outcome = drive(config, 600.0, load)
    assert outcome.interrupted
    assert outcome.stats is not None
    assert outcome.stats.delivered == sum(load.accepted) > 0


@walkable
def test_an_interrupt_anywhere_in_a_wait_leaves_its_event_usable() -> None:
    # Event.wait() itself does not survive one between the getting of its lock and its `with`: it keeps the lock.
    codes = {function.__code__ for function in (threading.Event.wait, threading.Condition.__enter__)}
    position, reached = 0, True
    while reached:
        position, seen = position + 1, 0
        event = threading.Event()

        def step(frame: Any, kind: str, _: object, position: int = position) -> Any:
            nonlocal seen
            if frame.f_code not in codes:
                return None
            frame.f_trace_opcodes = True
            if kind == "opcode":
                seen += 1
                if seen == position:
                    signal.raise_signal(signal.SIGINT)
            return step

        with soak_interrupts.kept():
            before = sys.gettrace()
            sys.settrace(step)
            try:
                soak_interrupts.wait(event, 0.001)
                interrupted = soak_interrupts.take()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(before)
        reached = seen >= position
        assert interrupted == reached
        assert event._cond.acquire(False), position  # type: ignore[attr-defined]
        event._cond.release()  # type: ignore[attr-defined]
    assert position > 10


@pytest.mark.parametrize("work", ["calibrate", "drive"])
def test_a_second_interrupt_in_a_later_wait_is_not_taken_for_the_first(work: str) -> None:
    config = soak_settings.config_from(argparse.Namespace(producers=2), 600.0)
    load = Load(config)

    def interrupted() -> bool:
        return drive(config, 600.0, load).interrupted if work == "drive" else calibrate(config, 600.0).interrupted

    with soak_interrupts.kept():
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        second = mock.patch.object(threading.Event, "wait", lambda *_: signal.raise_signal(signal.SIGINT))
        real = soak_interrupts.wait

        def wait(event: threading.Event, seconds: float) -> bool:
            with second:
                return real(event, seconds)

        with mock.patch.object(soak_interrupts, "wait", wait), pytest.raises(KeyboardInterrupt) as caught:
            interrupted()
    assert not isinstance(caught.value, soak_interrupts.Interrupted)


def test_an_interrupt_whose_wake_up_is_lost_ends_a_wait_all_the_same() -> None:
    # As one that comes between the last look for signals and the system's wait, which then has nothing to wait for.
    event = threading.Event()
    real, waits = event.wait, []

    def wait(timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout <= soak_interrupts.GLANCE
        waits.append(timeout)
        if len(waits) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(0)

    with mock.patch.object(event, "wait", wait), soak_interrupts.kept(), pytest.raises(soak_interrupts.Interrupted):
        soak_interrupts.wait(event, 600.0)
    assert len(waits) == 2


def test_a_second_ctrl_c_ends_a_soak_without_a_result(tmp_path: Path) -> None:
    options = ("--producers", "2", "--out", str(tmp_path), "--duration", "100ms", "--settings", "none")
    with OnTerminal("-c", INTERRUPTED, "flush2", "run", *options) as terminal:
        for number in range(2):
            terminal.read_until(f"now: flush{number}")
            terminal.interrupt()
        assert terminal.exit_code() == 130, terminal.text
    assert terminal.text.splitlines()[-1].endswith("soak: interrupted again: there is no result")
    assert_restored(terminal.text)


@pytest.mark.parametrize(
    ("argv", "phase", "words", "code", "last"),
    [
        (["tune"], "", "payload size", 130, "soak: interrupted"),
        (["tune", "--payload", "64"], "drive", "now: drive", 130, "soak: interrupted: there are no settings"),
        (
            ["baseline", "--producers", "2"],
            "calibrate",
            "now: calibrate",
            130,
            "soak: interrupted: nothing is recorded",
        ),
        (["stress", "--each", "1000000"], "", "stress: 256 producers", 0, "written       "),
    ],
    ids=["tune asking", "tune", "baseline", "stress"],
)
def test_ctrl_c_in_other_commands_of_soak_is_told_in_a_line(
    argv: list[str], phase: str, words: str, code: int, last: str, tmp_path: Path
) -> None:
    with OnTerminal("-c", INTERRUPTED, phase, *argv, "--out", str(tmp_path)) as terminal:
        terminal.read_until(words)
        terminal.interrupt()
        assert terminal.exit_code() == code, terminal.text
    assert last in terminal.text.splitlines()[-1]
    assert_restored(terminal.text)
    if code:
        assert list(tmp_path.iterdir()) == []
    else:
        (path,) = tmp_path.iterdir()
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["interrupted"]
        assert result["accepted"] == result["delivered"] < result["wanted"]


EMULATED = """#!{python}
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    print("now: emulated", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.5)  # longer than subprocess.run() would wait until it kills
    print("ended well", flush=True)
    raise SystemExit(7) from None
"""


ON_PI = """
import os, sys
from pathlib import Path

os.close(os.open(os.ttyname(0), os.O_RDWR))

from soak import pi
from soak.__main__ import entry

emulator = Path(sys.argv.pop(1))
pi.provide = lambda: (emulator, emulator.parent)
pi.interpreter = lambda root: emulator
sys.exit(entry())
"""


@pytest.mark.parametrize("key", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_lets_a_soak_that_is_emulated_end_in_its_own_way(key: bool, tmp_path: Path) -> None:
    emulator = tmp_path / "emulator"
    emulator.write_text(EMULATED.format(python=sys.executable), encoding="utf-8")
    emulator.chmod(0o755)
    with OnTerminal("-c", ON_PI, str(emulator), "pi", "run") as terminal:
        terminal.read_until("now: emulated")
        if key:
            terminal.interrupt()
        else:
            terminal.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 7, terminal.text
    assert "ended well" in terminal.text
    assert "Traceback" not in terminal.text


def test_a_soak_stress_that_is_not_done_in_time_fails() -> None:
    options = argparse.Namespace(producers=2)
    config = soak_settings.config_from(options, 1.0)
    counted, outcome = soak_census.take(config, 5.0, each=10, every=0.001)
    assert soak_stress.judge(config, counted, outcome, 20).status == "pass"
    late = soak_stress.judge(config, counted, outcome, 21)
    assert (late.status, late.note.partition(";")[0]) == ("fail", "not done within 1.00 s: 20 of 21 payloads sent")
    outcome.interrupted = True
    assert soak_stress.judge(config, counted, outcome, 21).status == "warn"


def test_what_soak_tune_finds_is_what_a_run_uses_unless_an_option_says_else(tmp_path: Path) -> None:
    done = run_python("-m", "soak", "tune", "--probe", "10ms", "--payload", "64", "--out", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("CALIBRATED: ", "PROVISIONAL: "))
    tuned = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["settings"]
    assert tuned["payload"] == "64"
    assert done.stdout.endswith(f"settings.json: a run with --out {tmp_path} uses them from now on\n")
    parser = soak_main.parser()
    options = parser.parse_args(["run", "--out", str(tmp_path), "--producers", "3"])
    config, note = soak_run.configure(options, soak_environment.describe())
    assert (config.payload, config.producers) == (64, 3)
    assert config.max_buffered_bytes == int(tuned["max_buffered_bytes"])
    assert config.max_batch_bytes == (None if tuned["max_batch_bytes"] == "none" else int(tuned["max_batch_bytes"]))
    assert str(tmp_path / "settings.json") in note
    options = parser.parse_args(["run", "--out", str(tmp_path), "--settings", "none"])
    assert soak_run.configure(options, {})[0].payload == "telemetry"


def test_soak_pi_does_not_take_the_memory_of_the_host_for_its_own() -> None:
    assert soak_environment.describe()["memory_bytes"]
    with mock.patch.dict(os.environ, {soak_environment.EMULATED: "a board"}):
        place = soak_environment.describe()
    assert (place["machine"], place["memory_bytes"]) == ("a board", None)


def test_a_soak_does_not_use_the_settings_of_another_machine(tmp_path: Path) -> None:
    place = {"machine": "a board", "cores": 4, "interpreter": "CPython 3.11"}
    path = soak_settings.write(tmp_path, {"producers": "7"}, place, True, "today")
    assert soak_settings.read(path, place)[0] == {"producers": "7"}
    found, note = soak_settings.read(path, {**place, "cores": 2})
    assert found == {}
    assert "another cores" in note


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', '{"settings": {"nobody": "1"}, "environment": {}}'])
def test_a_file_that_holds_no_soak_settings_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        soak_settings.read(path, {})


@settings(deadline=None)
@given(memory=st.one_of(st.none(), st.integers(1 << 20, 1 << 50)), size=st.integers(0, 1 << 20))
def test_soak_tune_never_recommends_more_than_an_eighth_of_the_memory(memory: int | None, size: int) -> None:
    config = soak_settings.config_from(argparse.Namespace(payload=size, max_buffered_bytes=1 << 20), 1.0)
    most = soak_tune.largest_buffer(config, memory)
    within = soak_heap.bound(replace(config, producers=32, max_buffered_bytes=most)) <= (memory or 512 << 20) // 8
    assert within or most == 1  # not even one byte: then it recommends nothing


def test_soak_tune_asks_until_the_answer_is_a_payload_size(capsys: Any) -> None:
    answers = iter(["heavy\n", "10KiB\n"])
    assert soak_tune.ask(lambda: next(answers)) == 10 * 1024
    assert "'heavy' is not a size" in capsys.readouterr().err
    assert soak_tune.ask(lambda: "") == "telemetry"
    assert soak_tune.ask(lambda: "heavy") == "telemetry"


def test_a_soak_baseline_is_worse_when_ratio_heap_or_drain_is_beyond_its_spread() -> None:
    known = ("board", 0.5, 0.1)
    assert verdict.judge_throughput(1.0, 0.41, known).status == "pass"
    assert verdict.judge_throughput(1.0, 0.39, known).status == "fail"
    heap = ("board", 1000.0, 100.0)
    assert verdict.judge_memory(1100, 5000, 0, heap).status == "pass"
    assert verdict.judge_memory(1101, 5000, 0, heap).status == "fail"
    assert verdict.judge_memory(1101, 5000, 0).status == "pass"
    drain = ("board", 0.01, 0.05)
    assert verdict.judge_drain(0.06, drain).status == "pass"
    assert verdict.judge_drain(0.07, drain) == verdict.Finding(
        "fail", "drained in 70.0 ms: above the baseline board: 10.0 ms +- 50.0 ms"
    )


def test_a_recorded_soak_baseline_is_found_by_machine_interpreter_and_settings(tmp_path: Path) -> None:
    place = soak_environment.describe()
    config = soak_settings.config_from(argparse.Namespace(producers=2), 0.1)
    result = {
        "ratio": 0.5,
        "peak_heap_bytes": 1000,
        "drain_seconds": 0.001,
        "delivered_per_second": 1.0,
        "calibration": 2.0,
        "config": config.as_json(),
        "interrupted": False,
        "verdict": {"overall": {"status": "pass", "note": ""}},
    }
    with mock.patch.object(soak_run, "run", return_value=result), contextlib.redirect_stdout(io.StringIO()):
        code = soak_main.main(["baseline", "--runs", "2", "--producers", "2", "--out", str(tmp_path)])
    assert code == 0
    choice = soak_baseline.choose("auto", config.as_json(), place, tmp_path)
    assert choice.baseline is not None
    assert choice.baseline.expected("ratio") == (choice.baseline.name, 0.5, 0.025)
    for other in ({**config.as_json(), "producers": 3}, {**config.as_json(), "interval": 1.0}):
        assert soak_baseline.choose("auto", other, place, tmp_path).baseline is None


def test_a_soak_run_that_fails_is_not_recorded(tmp_path: Path, capsys: Any) -> None:
    result = {"interrupted": False, "verdict": {"overall": {"status": "fail", "note": "correctness fail"}}}
    with mock.patch.object(soak_run, "run", return_value=result):
        assert soak_main.main(["baseline", "--runs", "2", "--out", str(tmp_path)]) == 1
    assert "correctness fail: not recorded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_soak_pi_on_a_raspberry_pi_runs_there(tmp_path: Path, capsys: Any) -> None:
    with mock.patch.object(soak_environment, "machine", return_value="Raspberry Pi 4 Model B Rev 1.4"):
        code = soak_main.main(["pi", "stress", "--producers", "2", "--each", "5", "--out", str(tmp_path)])
    told = capsys.readouterr()
    assert code == 0
    assert "not emulated" in told.err
    assert "10 delivered" in told.out


def test_soak_pi_without_debians_tools_says_so_in_a_line(tmp_path: Path, capsys: Any) -> None:
    with mock.patch.object(soak_pi, "CACHE", tmp_path), mock.patch.object(shutil, "which", return_value=None):
        assert soak_main.main(["pi"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("soak: no apt-get here: ")


def monitored(display: str) -> None:
    """What a run shows of two snapshots."""
    config = soak_settings.config_from(argparse.Namespace(), 1.0)
    with make() as d, soak_progress.open_monitor(display, config, None, 1.0, 1024) as monitor:
        d.enqueue(b"x")
        monitor.sample(0.5, d.stats())
        monitor.sample(1.0, d.stats())
        d.stop()


def test_a_soak_shows_a_live_display_with_rich(capsys: Any) -> None:
    pytest.importorskip("rich")
    monitored("live")
    shown = capsys.readouterr().err
    assert "events/s" in shown
    assert "time left" in shown


@pytest.mark.parametrize(("display", "lines"), [("live", 3), ("plain", 2), ("auto", 2), ("none", 0)])
def test_a_soak_without_rich_shows_plain_lines(display: str, lines: int, capsys: Any) -> None:
    with mock.patch.dict(sys.modules, {"rich.console": None, "rich.progress_bar": None}):
        monitored(display)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_without_pyperf_the_benchmark_says_what_to_do() -> None:
    program = "import sys; sys.modules['pyperf'] = None; from soak.__main__ import main; main(['bench'])"
    done = run_python("-c", program, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "bench needs pyperf" in line


def test_an_interpreter_without_tracemalloc_soaks_without_a_look_at_the_heap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"]
    short_passes = mock.patch.object(Config, "pass_seconds", return_value=0.1)
    with short_passes, mock.patch.object(soak_heap, "TRACED", False):
        assert soak_main.main(["run", *options]) == 0
        assert soak_worker.run_heap(0.1) == {}

    out = capsys.readouterr().out
    assert "peak not measured" in out
    assert "warn: not measured: this interpreter has no tracemalloc" in out


def test_a_verdict_of_fail_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"]
    short_passes = mock.patch.object(Config, "pass_seconds", return_value=0.1)
    with short_passes, mock.patch.object(verdict, "DRAIN_FAIL", -1.0):
        code = soak_main.main(["run", *options])
    assert code == 1
    assert re.search("FAIL: .*drain fail", capsys.readouterr().out)


def test_the_telemetry_mix_is_163_bytes_on_average() -> None:
    events = soak_payloads.events(None, 7, soak_payloads.Sent(None))
    sizes = [len(event) for event in islice(events, 20 * 256)]
    assert sum(sizes) / len(sizes) == pytest.approx(163, abs=1)
    assert max(sizes) == soak_payloads.LARGEST


@pytest.mark.parametrize("size", [0, 1, 14, 15, 34, 35, 64, 10240])
def test_events_of_one_size_have_that_size(size: int) -> None:
    events = soak_payloads.events(size, 7, soak_payloads.Sent(size))
    assert {len(event) for event in islice(events, 600)} == {size}


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("64B", 64), ("320KiB", 327680), ("1.5MiB", 1572864), ("1GiB", 1 << 30)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "0", "-1", "1.5", "10KB", "1 KiB", "1e3", "nan", "99999999999999GiB"])
def test_bad_sizes_are_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1m30s", 90), ("10ms", 0.01), ("10us", 1e-5), ("1.5h", 5400), ("7ns", 7e-9)]
)
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "0s", "0", "-5s", "5 m", "1e3s", "inf", "999999999999h"])
def test_bad_times_are_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({}, "pass"),
        ({"lost": 1}, "fail"),
        ({"duplicated": 1}, "fail"),
        ({"rejected": 1}, "fail"),
        ({"rejected": 1, "on_full": "raise"}, "pass"),
        ({"problems": ["a consumer raised"]}, "fail"),
    ],
)
def test_the_verdict_on_correctness(figures: dict[str, Any], status: str) -> None:
    clean: dict[str, Any] = {"problems": [], "lost": 0, "duplicated": 0, "rejected": 0, "on_full": "block"}
    assert verdict.judge_correctness(**{**clean, **figures}).status == status


def test_the_overall_verdict_is_the_worst_one() -> None:
    good, poor, bad = (verdict.Finding(status, "") for status in ("pass", "warn", "fail"))
    assert verdict.overall({"a": good, "b": good}).status == "pass"
    assert verdict.overall({"a": good, "b": poor}).status == "warn"
    assert verdict.overall({"a": bad, "b": poor}) == verdict.Finding("fail", "a fail, b warn")


PLACE = {"machine": "a machine", "cores": 2, "interpreter": "CPython 3.11", "python": "3.11.2", "commit": "c" * 40}


RESULT = """{
  "schema": 1, "started": "2026-11-24T12:00:00+0000", "interrupted": false, "samples": "samples.jsonl",
  "delivered_per_second": 500000.0, "delivered": 10000000, "lost": 0, "duplicated": 0, "rejected": 0,
  "load_seconds": 20.0, "drain_seconds": 0.0007, "shutdown_seconds": 0.00006, "problems": [],
  "calibration": 1000000.0, "ratio": 0.5, "baseline": null, "peak_heap_bytes": 2700000, "peak_rss_bytes": 45000000,
  "latency_seconds": {"p50": 0.02, "p99": 0.05, "max": 0.1, "samples": 9, "buckets": [[0.0, 5], [0.03, 4]]},
  "heap": {"bound_bytes": 3500000, "allowance_bytes": 300000, "peak_buffered_bytes": 2000000, "seconds": 2},
  "stats": {"peak_buffered_bytes": 2000000},
  "config": {"producers": 32, "consumers": 1, "max_buffered_bytes": 2097152, "on_full": "block"}
}"""
