# SPDX-License-Identifier: MIT
"""The sinks: each event is there once, in order, through faults; and what is wrong is found."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import payloads
from soak.__main__ import main
from soak.debian import SetupError
from soak.load import Account
from soak.recipes.file_sink import FileSink, rotated
from soak.sinks import readback, servers
from soak.tests.helpers import LIMIT, OnTerminal, Worker, batch_of, run_python, wait_until
from soak.tests.test_commands import short_passes, soak

pytestmark = pytest.mark.usefixtures("no_thread_left")


# Files, and HTTP.


def deliver(sink: Any, *batches: list[bytes]) -> None:
    for batch in batches:
        sink.deliver(batch_of(*batch))
    sink.close()


def test_the_file_sink_writes_an_event_a_line_and_keeps_newlines_out(tmp_path: Path) -> None:
    deliver(FileSink(tmp_path / "events"), [b'{"a":1}', b'{\n"a": 2\n}'], [b""])
    assert (tmp_path / "events").read_bytes() == b'{"a":1}\n{ "a": 2 }\n\n'


def test_the_file_sink_begins_a_new_file_before_a_batch_that_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "events"
    deliver(FileSink(path, rotate_bytes=10), [b"0...", b"."], [b"1...", b"."], [b"more than the limit"])
    deliver(FileSink(path, rotate_bytes=10), [b"after a restart"])
    contents = [b"0...\n.\n", b"1...\n.\n", b"more than the limit\n"]
    assert [file.read_bytes() for file in rotated(path)] == contents
    assert path.read_bytes() == b"after a restart\n"


def small_disk(room: int, failures: int) -> mock.Mock:
    """An os.write on a disk that takes so many bytes, one a call, and then has so many failures."""
    write, full = os.write, OSError(28, "No space left on device")
    fates = itertools.chain([None] * room, [full] * failures, itertools.repeat(None))

    def one_byte(fd: int, data: bytes) -> int:
        if (error := next(fates)) is not None:
            raise error
        return write(fd, data[:1])

    return mock.Mock(side_effect=one_byte)


@pytest.mark.parametrize(("patience", "failed"), [(30.0, False), (0.0, True)])
def test_the_file_sink_goes_on_when_the_disk_has_room_again_or_takes_half_a_batch_out(
    patience: float, failed: bool, tmp_path: Path
) -> None:
    sink = FileSink(tmp_path / "events", patience=patience)
    fails = pytest.raises(OSError, match="No space") if failed else contextlib.nullcontext()
    with mock.patch.object(os, "write", small_disk(4, 1)), mock.patch("time.sleep"), fails:
        sink.deliver(batch_of(b"first", b"second"))
    deliver(sink, [b"after"])
    assert (tmp_path / "events").read_bytes() == (b"" if failed else b"first\nsecond\n") + b"after\n"


@contextlib.contextmanager
def answering(*codes: int) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that answers with these codes; yields its address, and the key and body of each request."""
    seen: list[tuple[str, bytes]] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            seen.append((self.headers["Idempotency-Key"], body))
            self.send_response(codes[len(seen) - 1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        log_message = mock.Mock()

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = Worker(server.serve_forever, poll_interval=0.01)
        try:
            yield f"http://127.0.0.1:{server.server_port}/", seen
        finally:
            server.shutdown()
            thread.result()


def test_the_http_sink_posts_again_under_the_same_key_and_raises_what_will_not_pass() -> None:
    module = pytest.importorskip("soak.recipes.http_sink", exc_type=ImportError)
    with answering(503, 429, 204, 204, 400, 503, 503) as (url, seen):
        deliver(module.HttpSink(url, compress=True, longest_pause=0.01), [b"1", b"2"], [b"3"])
        sink = module.HttpSink(url, compress=True, tries=2, longest_pause=0.01)
        for why in ("answered 400", "503"):
            with pytest.raises(module.urllib3.exceptions.HTTPError, match=why):
                sink.deliver(batch_of(b"4"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n2\n"] * 3 + [b"3\n"] + [b"4\n"] * 3
    keys = [key for key, _ in seen]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 4 and keys[5] == keys[6]


# Reading back.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e, {}),
        (lambda e: e[:4] + e[5:], {"lost": 1, "checksum_equal": False}),
        (lambda e: [*e, e[-1]], {"repeated": 1}),
        (lambda e: [e[2], e[1], e[0], *e[3:]], {"out_of_order": 1}),
        (lambda e: [*e[1::2], *e[::2]], {}),  # of two producers: nobody promised that
        (lambda e: [*e, b'{"id":"0009-1000000000"}'], {"strange": 1}),
        (lambda e: [*e, b"?"], {"strange": 1}),
        (lambda e: [e[0][:-1], *e[1:]], {"checksum_equal": False}),
    ],
    ids=["equal", "lost", "repeated", "swapped", "other order", "stranger", "torn", "changed"],
)
def test_reading_back_finds_what_is_wrong(
    change: Callable[[list[bytes]], list[bytes]], expected: dict[str, object]
) -> None:
    accounts, sources = [Account(), Account()], [payloads.events(None, i, payloads.Sent(None)) for i in range(2)]
    events = [next(source) for _ in range(10) for source in sources]  # those of two producers alternate
    for i, event in enumerate(events):
        accounts[i % 2].add(event)
    found = readback.compare(change(events), accounts, None, once=True, ordered=True)
    kinds = {"lost": 0, "repeated": 0, "out_of_order": 0, "strange": 0, "checksum_equal": True}
    assert {kind: getattr(found, kind) for kind in kinds} == {**kinds, **expected}
    assert len(found.problems) == len(expected)


@short_passes
def test_a_run_into_a_file_reads_every_event_back(tmp_path: Path) -> None:
    code, result = soak(tmp_path, "--bulk", "50", "--sink", f"file:{tmp_path / 'events'}")
    assert code == 0, result["problems"]
    assert result["sink"]["events"] == result["accepted"] > 0


@short_passes
def test_a_run_whose_sink_loses_an_event_fails(tmp_path: Path) -> None:
    real = FileSink.deliver
    with mock.patch.object(FileSink, "deliver", lambda self, batch: real(self, batch_of(*batch.tolist()[1:]))):
        code, result = soak(tmp_path, "--sink", f"file:{tmp_path / 'events'}")
    assert code == 1 and result["lost"] > 0
    assert "accepted events are not there" in result["verdict"]["correctness"]["note"]


def test_a_sink_without_its_package_or_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"redis://127.0.0.1:{servers.free_port()}"
    blocks = [({"redis": None}, "needs a package")]
    if importlib.util.find_spec("redis") and importlib.util.find_spec("tenacity"):
        blocks.append(({}, "cannot be opened"))
    for modules, why in blocks:
        with mock.patch.dict(sys.modules, modules), pytest.raises(SystemExit) as caught:
            main(["run", "--sink", url])
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert f"'{url}' {why}" in line


# The command, and real servers.


CLIENTS = {"redis": "redis", "postgresql": "psycopg", "nats": "nats", "http": "urllib3"}


def have(kind: str) -> None:
    """Skip the test without the client's packages, or a server that is neither installed nor in the cache."""
    for package in (CLIENTS[kind], "tenacity"):
        pytest.importorskip(package)
    if package := servers.KINDS[kind].package:
        with mock.patch("soak.debian.shutil", which=lambda _: None):  # fetch nothing
            try:
                servers.find("initdb" if kind == "postgresql" else package, package)
            except SetupError:
                pytest.skip(f"no {package} is here (make soak-sinks fetches it)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "faults"), [("http", "kill,reset,refuse"), ("redis", "reset"), ("postgresql", "reset"), ("nats", "reset")]
)
def test_what_was_accepted_is_in_the_server_through_faults(kind: str, faults: str, tmp_path: Path) -> None:
    have(kind)
    path = tmp_path / "result.json"
    options = ("--only", kind, "--faults", faults, "--duration", "1s", "--producers", "4", "--json", str(path))
    done = run_python("-m", "soak", "sinks", *options, "--max-buffered-bytes", "256KiB", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["fault"] for row in result["rows"]] == ["none", *faults.split(",")]
    for row in result["rows"]:
        assert row["read"]["lost"] == 0
        assert row["read"]["events"] - row["read"]["repeated"] == row["accepted"] > 0
        assert kind == "http" or row["read"]["repeated"] == 0  # the receiver does not heed the key
    assert result["left_out"] == []


@pytest.mark.slow
def test_the_sinks_command_that_is_told_to_end_ends_its_server(tmp_path: Path) -> None:
    have("http")
    options = ("--only", "http", "--faults", "none", "--duration", "10m", "--producers", "2", "--json", os.devnull)
    with OnTerminal("-m", "soak", "sinks", *options, TMPDIR=str(tmp_path)) as terminal:
        terminal.read_until("calibration: ")
        wait_until(lambda: list(tmp_path.glob("tempo-sinks-*/http/data/*")), "the server")
        (folder,) = tmp_path.iterdir()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 1, terminal.text
    assert "INTERRUPTED" in terminal.text
    assert not folder.exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not any(os.fsencode(folder) in command for command in commands)


def test_the_sinks_command_reads_back_and_leaves_out_a_server_that_cannot_be_had(tmp_path: Path) -> None:
    options = ["--only", "nats,file", "--producers", "2", "--duration", "0.2s", "--out", str(tmp_path)]
    with mock.patch.object(servers, "find", side_effect=SetupError("no apt-get here")):
        assert main(["sinks", *options]) == 0
    (file,) = tmp_path.glob("sinks-*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["fault"], row["read"]["lost"]) for row in result["rows"]] == [("none", 0), ("full", 0)]
    assert result["left_out"] == ["nats: no apt-get here"]


@pytest.mark.slow
def test_the_redis_sink_goes_on_when_a_machine_of_its_cluster_comes_back(tmp_path: Path) -> None:
    have("redis")
    redis = pytest.importorskip("redis", minversion="6.1")  # the first whose RedisCluster has transactions
    module = importlib.import_module("soak.recipes.redis_sink")
    buses = [servers.free_port() for _ in range(3)]  # where they talk to each other
    patient = {"socket_timeout": LIMIT, "socket_connect_timeout": LIMIT}
    with contextlib.ExitStack() as stack:
        options = "--cluster-enabled yes --cluster-node-timeout 1000 --cluster-port"
        kind, folders = servers.KINDS["redis"], [tmp_path / f"server {bus}" for bus in buses]
        kinds = [kind._replace(command=f"{kind.command} {options} {bus}") for bus in buses]
        made = [servers.Server(kind, folder) for kind, folder in zip(kinds, folders)]
        found = [stack.enter_context(server) for server in made]
        nodes = [stack.enter_context(redis.Redis(port=server.port, **patient)) for server in found]
        for i, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * i // 3, 16384 * (i + 1) // 3 - 1)
            node.execute_command("CLUSTER MEET", servers.HOST, found[0].port, buses[0])
        wait_until(lambda: all(node.cluster("INFO")["cluster_state"] == "ok" for node in nodes), "the cluster")
        cluster = stack.enter_context(redis.RedisCluster(host=servers.HOST, port=found[0].port, **patient))
        streams = [f"events:{{{i}}}" for i in range(6)]
        assert len({cluster.get_node_from_key(stream).port for stream in streams}) == 3
        sinks = [module.RedisSink(cluster, stream) for stream in streams]
        for sink in sinks:
            sink.deliver(batch_of(b"1", b"2"))

        (away,) = (server for server in found if server.port == cluster.get_node_from_key(streams[0]).port)
        away.kill()
        tries = mock.Mock(side_effect=sinks[0]._append)
        with mock.patch.object(sinks[0], "_append", tries):
            worker = Worker(sinks[0].deliver, batch_of(b"while it was away"))
            wait_until(lambda: tries.call_count > 1, "a second try")
            away.start()
            worker.result()
        there = [[fields[b"event"] for _, fields in cluster.xrange(stream)] for stream in streams]
        assert there == [[b"1", b"2", b"while it was away"]] + [[b"1", b"2"]] * 5
