# SPDX-License-Identifier: MIT
"""The spool: what finds no room, or is not delivered, waits in a file."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import tempo
from soak.recipes.spool import Spool, SpoolError, SpoolFull
from soak.tests.helpers import ENVIRONMENT, make, run_python

pytestmark = pytest.mark.usefixtures("no_thread_left")
PAGES_OF_AN_EMPTY_ONE = 2 * 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    with Spool(path, max_bytes=tempo.MiB) as spool:
        yield spool


def in_file(path: Path) -> list[bytes]:
    """What the spool's file holds, in order."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [data for (data,) in db.execute("SELECT data FROM records ORDER BY id")]


def test_a_record_leaves_the_spool_when_it_was_sent_and_not_before(spool: Spool, path: Path) -> None:
    def send(records: list[bytes]) -> None:
        assert records == in_file(path) == [b"a", b"b"]
        assert spool.put([b"meanwhile"]) == 1
        assert spool.replay(send) == 0  # one at a time

    spool.put([b"a", b"b"])
    for error in (OSError("the sink is away"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            spool.replay(mock.Mock(side_effect=error))
    assert spool.replay(send) == 2
    assert in_file(path) == [b"meanwhile"]
    assert (len(spool), spool.nbytes) == (1, PAGES_OF_AN_EMPTY_ONE)


def test_replay_sends_all_in_order_so_much_at_a_time(spool: Spool) -> None:
    records = [bytes([i]) * size for i, size in enumerate([100_000] * 5 + [0, 300_000, 1])]
    spool.put(records)
    assert len(spool) == 8
    assert spool.nbytes == pytest.approx(800_000, rel=0.1)
    sent: list[list[bytes]] = []
    while spool.replay(sent.append):
        pass
    assert [record for some in sent for record in some] == records
    assert [len(some) for some in sent] == [2, 2, 2, 1, 1]
    assert (len(spool), spool.nbytes) == (0, PAGES_OF_AN_EMPTY_ONE)


@pytest.mark.parametrize("closed", [False, True])
def test_only_what_the_dispatcher_refuses_and_could_take_goes_to_the_spool(
    spool: Spool, path: Path, closed: bool
) -> None:
    d = make(max_buffered_bytes=5)
    with pytest.raises(tempo.PayloadTooLarge):
        spool.enqueue(d, b"never fits")
    if closed:
        d.stop()
    records: list[Any] = [b"ab", bytearray(b"cd"), memoryview(b"ef"), b"gh"]
    assert spool.enqueue_many(d, iter(records)) == (0 if closed else 2)
    assert spool.enqueue(d, b"ij") is False
    assert spool.enqueue(d, b"k") is not closed
    refused = [b"ef", b"gh", b"ij"]
    assert in_file(path) == ([b"ab", b"cd", *refused, b"k"] if closed else refused)
    assert d.stats().buffered == (0 if closed else 3)


def test_a_full_spool_takes_all_of_a_call_or_nothing_and_has_room_again(path: Path) -> None:
    records = [b"%05d" % i * 800 for i in range(20)]  # a page each
    with Spool(path, max_bytes=20 * 4096) as spool:
        spool.put(records[:10])
        with pytest.raises(SpoolFull, match=f"{path}: .*full") as full:
            spool.put(records)
        assert (full.value.rest, in_file(path)) == (records, records[:10])
        spool.put(records[10:12])
        with pytest.raises(SpoolFull) as full:
            spool.enqueue_many(make(max_buffered_bytes=8000), records)
        assert (full.value.accepted, full.value.rest) == (2, records[2:])
        assert 12 * 4096 < spool.nbytes <= 20 * 4096
        assert spool.replay(lambda sent: None) == 12
        spool.put(records[:12])
    assert in_file(path) == records[:12]
    assert path.stat().st_size <= 20 * 4096


def test_one_spool_at_a_time_has_the_file(spool: Spool, path: Path) -> None:
    with pytest.raises(SpoolError, match="in use by another Spool"):
        Spool(path, max_bytes=1000)
    spool.put([b"left"])
    spool.close()
    with pytest.raises(SpoolError, match="closed"):
        spool.put([b"late"])
    with Spool(path, max_bytes=1) as again, pytest.raises(SpoolFull):  # a lower limit takes nothing away
        assert len(again) == 1
        again.put([bytes(4096)])


def test_what_is_no_spool_is_left_alone(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other (data)")
    before = path.read_bytes()
    with pytest.raises(SpoolError, match="it is a database, but no spool"):
        Spool(path, max_bytes=1000)
    assert path.read_bytes() == before
    path.write_bytes(b"text" * 1000)
    with pytest.raises(SpoolError, match="not a database"):
        Spool(path, max_bytes=1000)


FORKED = """
import os
from soak.recipes.spool import Spool, SpoolError

spool = Spool("spool", max_bytes=10_000)
spool.put([b"before"])
if not (pid := os.fork()):
    try:
        spool.put([b"child"])
    except SpoolError as exc:
        print(exc, flush=True)
    spool.close()
    del spool  # SQLite closes what it has
    os._exit(0)
os.waitpid(pid, 0)
spool.put([b"after"])
os._exit(0)  # as a kill: nothing is closed
"""


def test_a_forked_child_is_refused_by_the_spool_and_its_exit_does_no_harm(path: Path) -> None:
    done = run_python("-c", FORKED, cwd=path.parent)
    assert "let a child open its own" in done.stdout and done.stderr == ""
    assert in_file(path) == [b"before", b"after"]


KILLED = """
import contextlib, random, sys, time, tempo
from soak.recipes.spool import Spool, SpoolFull

number = int(sys.argv[1])
dice = random.Random(number)
spool = Spool("spool", max_bytes=20_000)
d = tempo.Dispatcher(interval=0.001, max_buffered_bytes=400, max_batch_bytes=150)
logs = {name: open(name, "ab", buffering=0) for name in ("taken", "delivered")}

def log(name, records):  # a kill may cut it short: what was cut is known by its length
    logs[name].write(b"".join(b"\\n" + record for record in records) + b"\\n")

def handler(batch):
    fate = dice.random()
    if fate < 0.1:
        raise OSError("not sent")
    log("delivered", batch.tolist())
    if fate < 0.2:
        raise OSError("sent, and the answer lost")
    spool.replay(lambda records: log("delivered", records))

def on_error(exc, batch):
    with contextlib.suppress(SpoolFull):  # what the file has not taken is promised to nobody
        spool.put(batch)
        log("taken", batch.tolist())

d.start(handler, on_error=on_error)
print("ready", flush=True)
n = 0
while number >= 0:  # until it is killed
    records = [b"%04d-%06d" % (number, n + i) for i in range(dice.choice([1, 11]))]
    n += len(records)
    try:
        log("taken", records[spool.enqueue_many(d, records):])
    except SpoolFull:
        time.sleep(0.001)
while spool.replay(lambda records: log("delivered", records)):
    pass
d.shutdown(10.0)
"""


@pytest.mark.slow
def test_nothing_that_the_spool_has_taken_is_lost_by_twenty_kills(tmp_path: Path) -> None:
    for number in range(20):
        command = [sys.executable, "-c", KILLED, str(number)]
        with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(random.uniform(0.0, 0.1))
            process.kill()
    done = run_python("-c", KILLED, "-1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    taken, delivered = (
        {line for line in (tmp_path / name).read_bytes().split(b"\n") if len(line) == len(b"0000-000000")}
        for name in ("taken", "delivered")
    )
    assert len({record[:4] for record in taken}) > 10  # runs in which the file took something
    assert len(taken) > 500 and taken <= delivered
