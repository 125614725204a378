# SPDX-License-Identifier: MIT
"""The sinks: each event is there once, in order, through faults; and what is wrong is found."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.server
import importlib
import itertools
import json
import os
import re
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
from soak.sinks import command, places, readback, receiver, servers
from soak.tests.helpers import LIMIT, OnTerminal, Worker, batch_of, run_python, wait_until
from soak.tests.test_commands import soak

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
    deliver(FileSink(path, rotate_bytes=10), *([b"%d..." % i, b"."] for i in range(2)), [b"more than the limit"])
    assert [file.name for file in rotated(path)] == ["events.000001", "events.000002"]
    assert [file.read_bytes() for file in rotated(path)] == [b"0...\n.\n", b"1...\n.\n"]
    assert path.read_bytes() == b"more than the limit\n"
    deliver(FileSink(path, rotate_bytes=10), [b"after a restart"])
    assert rotated(path)[-1].name == "events.000003"


def small_disk(room: int, failures: int) -> mock.Mock:
    """An os.write on a disk that takes so many bytes, one a call, and then has so many failures."""
    write, full = os.write, OSError(28, "No space left on device")
    fates = itertools.chain([None] * room, [full] * failures, itertools.repeat(None))

    def one_byte(fd: int, data: bytes) -> int:
        if (error := next(fates)) is not None:
            raise error
        return write(fd, data[:1])

    return mock.Mock(side_effect=one_byte)


def test_the_file_sink_goes_on_where_it_was_when_the_disk_has_room_again(tmp_path: Path) -> None:
    with mock.patch.multiple(os, write=small_disk(4, 3), fsync=mock.DEFAULT) as used, mock.patch("time.sleep"):
        deliver(FileSink(tmp_path / "events", fsync=True), [b"first", b"second"])
    assert used["fsync"].call_count == 1
    assert (tmp_path / "events").read_bytes() == b"first\nsecond\n"


def test_the_file_sink_takes_half_a_batch_out_again_when_it_gives_up(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "events", patience=0.0)
    sink.deliver(batch_of(b"whole"))
    with mock.patch.object(os, "write", small_disk(4, 1)), pytest.raises(OSError, match="No space"):
        sink.deliver(batch_of(b"half"))
    broken = mock.patch.object(os, "write", side_effect=OSError(5, "Input/output error"))
    with broken, mock.patch("time.sleep") as sleep, pytest.raises(OSError, match="Input/output"):
        sink.deliver(batch_of(b"what will not pass is not waited for"))
    assert sleep.call_count == 0
    deliver(sink, [b"after"])
    assert (tmp_path / "events").read_bytes() == b"whole\nafter\n"


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


@pytest.mark.parametrize("compress", [False, True])
def test_the_http_sink_posts_again_under_the_same_key_and_raises_what_will_not_pass(compress: bool) -> None:
    module = pytest.importorskip("soak.recipes.http_sink", exc_type=ImportError)
    with answering(503, 429, 204, 204, 400, 503, 503) as (url, seen):
        deliver(module.HttpSink(url, compress=compress, longest_pause=0.01), [b"1", b"2"], [b"3"])
        sink = module.HttpSink(url, compress=compress, tries=2, longest_pause=0.01)
        for why in ("answered 400", "503"):
            with pytest.raises(module.urllib3.exceptions.HTTPError, match=why):
                sink.deliver(batch_of(b"4"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n2\n"] * 3 + [b"3\n"] + [b"4\n"] * 3
    keys = [key for key, _ in seen]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 4 and keys[5] == keys[6]


# Places, and reading back.


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nowhere", "is not a sink"),
        ("ftp://127.0.0.1", "is not a sink"),
        ("file:", "names no file"),
        ("redis:", "names no server"),
        ("http://", "names no server"),
        ("file:x#y", "is not a sink"),
    ],
)
def test_a_sink_that_is_none_is_named_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(why)) as error:
        places.parse(text)
    assert repr(text) in str(error.value)


def accepted_and_events() -> tuple[list[Account], list[bytes]]:
    """What two producers sent, and the same as one list in which their events alternate."""
    accounts, sources = [Account(), Account()], [payloads.events(None, i, payloads.Sent(None)) for i in range(2)]
    events = [next(source) for _ in range(10) for source in sources]
    for i, event in enumerate(events):
        accounts[i % 2].add(event)
    return accounts, events


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
        (lambda e: [*e, e[0].replace(b"1000000000", b"9999999999")], {"strange": 1}),
        (lambda e: [*e, e[0].replace(b"0000-1", b"-001-1")], {"strange": 1}),
        (lambda e: [e[0][:-1], *e[1:]], {"checksum_equal": False}),
    ],
    ids=["equal", "lost", "repeated", "swapped", "other order", "stranger", "torn", "unsent", "negative", "changed"],
)
def test_reading_back_finds_what_is_wrong(
    change: Callable[[list[bytes]], list[bytes]], expected: dict[str, object]
) -> None:
    accounts, events = accepted_and_events()
    found = readback.compare(change(events), accounts, None, once=True, ordered=True)
    kinds = {"lost": 0, "repeated": 0, "out_of_order": 0, "strange": 0, "checksum_equal": True}
    assert {kind: getattr(found, kind) for kind in kinds} == {**kinds, **expected}
    assert len(found.problems) == len(expected)


def test_reading_back_lets_a_sink_repeat_that_says_so_and_counts_small_events() -> None:
    accounts, events = accepted_and_events()
    assert not readback.compare([*events, events[0]], accounts, None, once=False, ordered=True).problems
    account = Account()
    for event in (b"1", b"2"):
        account.add(event)
    assert readback.compare([b"2", b"1"], [account], 1, once=True, ordered=True).problems == []
    assert len(readback.compare([b"2"], [account], 1, once=True, ordered=True).problems) == 2


short_passes = pytest.mark.usefixtures("short_passes")


@short_passes
@pytest.mark.parametrize(
    "options", ["--bulk 50", pytest.param("--on-full raise --max-buffered-bytes 64KiB", marks=pytest.mark.slow)]
)
def test_a_run_into_files_reads_every_event_back(options: str, tmp_path: Path) -> None:
    with mock.patch.object(places, "ROTATE", 100_000):
        code, result = soak(tmp_path, "--sink", f"file:{tmp_path / 'events'}", *options.split())
    assert code == 0, result["problems"]
    assert result["sink"]["events"] == result["accepted"] > 0
    assert len(list(tmp_path.glob("events.*"))) > 1


@short_passes
def test_a_run_into_a_device_says_that_nothing_can_be_read_back(tmp_path: Path) -> None:
    code, result = soak(tmp_path, "--sink", "file:/dev/null")
    assert (code, result["sink"]["read"]) == (0, False)


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


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\nb", b"a\n" + b"b" * 200_000, b"b" * 200_000])
def test_the_receiver_takes_a_torn_line_out_when_it_starts(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(text)
    receiver.drop_torn(str(path))
    assert path.read_bytes() == text[: text.rfind(b"\n") + 1]


# The command, and real servers.


CLIENTS = {"redis": "redis", "postgresql": "psycopg", "nats": "nats", "http": "urllib3"}


def have(kind: str) -> None:
    """Skip the test without the client's packages, or a server that is neither installed nor in the cache."""
    for package in (CLIENTS[kind], "tenacity"):
        pytest.importorskip(package)
    if package := servers.KINDS[kind].package:
        with mock.patch.object(servers, "fetch", side_effect=SetupError("not installed")):
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_sinks_command_that_is_told_to_end_ends_its_server(number: signal.Signals, tmp_path: Path) -> None:
    have("http")
    options = ("--only", "http", "--faults", "none", "--duration", "10m", "--producers", "2", "--json", os.devnull)
    with OnTerminal("-m", "soak", "sinks", *options, TMPDIR=str(tmp_path)) as terminal:
        terminal.read_until("calibration: ")
        wait_until(lambda: list(tmp_path.glob("tempo-sinks-*/http/data/*")), "the server")
        (folder,) = tmp_path.iterdir()
        terminal.process.send_signal(number)
        assert terminal.exit_code() == 1, terminal.text
    assert "INTERRUPTED" in terminal.text
    assert not folder.exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not any(os.fsencode(folder) in command for command in commands)


def test_the_sinks_command_says_that_it_was_interrupted_and_which_server_cannot_be_had(
    tmp_path: Path, capsys: Any
) -> None:
    real = vars(command)["drive"]

    def drive(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    interrupted = mock.patch.object(command, "drive", drive)
    options = ["--producers", "2", "--duration", "0.2s", "--out", str(tmp_path)]
    with interrupted, mock.patch.object(servers, "find", side_effect=SetupError("no apt-get here")):
        assert main(["sinks", "--only", "nats,null,file", *options]) == 1
    assert capsys.readouterr().out.startswith("INTERRUPTED: 1 of 1 loads well")
    (file,) = tmp_path.glob("sinks-*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["left_out"] == ["nats: no apt-get here"]


@contextlib.contextmanager
def redis_servers(folder: Path, *options: str) -> Iterator[list[servers.Server]]:
    """A server for each of these options, ended afterwards."""
    have("redis")
    with contextlib.ExitStack() as stack:
        kind = servers.KINDS["redis"]
        found = [servers.Server(kind, folder / f"server {i}", more=more) for i, more in enumerate(options)]
        for server in found:
            stack.enter_context(server)
        yield found


def in_stream(client: Any, stream: str) -> list[bytes]:
    """The events that are in a stream."""
    return [fields[b"event"] for _, fields in client.xrange(stream)]


@pytest.mark.slow
def test_the_redis_sink_trims_its_stream(tmp_path: Path) -> None:
    with redis_servers(tmp_path, "") as (server,):
        redis, module = importlib.import_module("redis"), importlib.import_module("soak.recipes.redis_sink")
        events = [b"%04d" % i for i in range(3000)]
        with redis.Redis(port=server.port, socket_timeout=LIMIT) as client:
            sinks = {maxlen: module.RedisSink(client, f"at most {maxlen}", maxlen=maxlen) for maxlen in (500, None)}
            for start in range(0, 3000, 100):
                for sink in sinks.values():
                    sink.deliver(batch_of(*events[start : start + 100]))
            kept = in_stream(client, "at most 500")
            assert kept == events[-len(kept) :]
            assert 500 <= len(kept) < 700  # Redis trims by whole nodes, of 100 entries
            assert in_stream(client, "at most None") == events


@pytest.mark.slow
def test_the_redis_sink_goes_on_when_a_machine_of_its_cluster_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("redis", minversion="6.1")  # the first whose RedisCluster has transactions
    options = "--cluster-enabled yes --cluster-node-timeout 1000 --cluster-port"
    buses = [servers.free_port() for _ in range(3)]  # where they talk to each other
    with redis_servers(tmp_path, *(f"{options} {bus}" for bus in buses)) as found, contextlib.ExitStack() as stack:
        redis, module = importlib.import_module("redis"), importlib.import_module("soak.recipes.redis_sink")
        patient = {"socket_timeout": LIMIT, "socket_connect_timeout": LIMIT}
        nodes = [stack.enter_context(redis.Redis(port=server.port, **patient)) for server in found]
        for i, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * i // 3, 16384 * (i + 1) // 3 - 1)
            node.execute_command("CLUSTER MEET", servers.HOST, found[0].port, buses[0])
        wait_until(lambda: all(node.cluster("INFO")["cluster_state"] == "ok" for node in nodes), "the cluster")
        cluster = stack.enter_context(redis.RedisCluster(host=servers.HOST, port=found[0].port, **patient))
        streams = [f"events:{{{i}}}" for i in range(6)]
        assert len({cluster.get_node_from_key(stream).port for stream in streams}) == 3
        sinks = [module.RedisSink(cluster, stream) for stream in streams]
        for i, sink in enumerate(sinks):
            sink.deliver(batch_of(b"%d" % i, b"next"))
        sinks[0]._append(1, [b"0", b"next"])  # the try whose answer was lost
        assert [in_stream(cluster, stream) for stream in streams] == [[b"%d" % i, b"next"] for i in range(6)]

        (away,) = (server for server in found if server.port == cluster.get_node_from_key(streams[0]).port)
        away.kill()
        tries = mock.Mock(side_effect=sinks[0]._append)
        with mock.patch.object(sinks[0], "_append", tries):
            worker = Worker(sinks[0].deliver, batch_of(b"while it was away"))
            wait_until(lambda: tries.call_count > 1, "a second try")
            away.start()
            worker.result()
        assert in_stream(cluster, streams[0]) == [b"0", b"next", b"while it was away"]


PASSING = [
    "redis.ConnectionError('away')",
    "redis.exceptions.ClusterDownError('The cluster is down')",
    "redis.exceptions.MovedError('3999 127.0.0.1:6381')",
    "redis.ResponseError('MISCONF Redis is configured to save')",
    "redis.ResponseError('Command # 1 (XADD a) of pipeline caused error: NOREPLICAS Not enough')",
    "redis.RedisClusterException('Redis Cluster cannot be connected. Please')",
]
LASTING = [
    "redis.AuthenticationError('invalid password')",
    "redis.ResponseError('Command # 1 (XADD NOREPLICAS) of pipeline caused error: WRONGTYPE')",
    "redis.RedisClusterException('shard_hint is deprecated')",
    "ValueError('MISCONF')",
]


@pytest.mark.parametrize("error", PASSING + LASTING)
def test_the_redis_sink_tries_again_what_may_pass(error: str) -> None:
    redis = pytest.importorskip("redis")
    pytest.importorskip("tenacity")
    module = importlib.import_module("soak.recipes.redis_sink")
    assert module.is_transient(eval(error, {"redis": redis})) is (error in PASSING)
