# SPDX-License-Identifier: MIT
"""The sinks: each event is there once, in order, through faults."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import importlib.util
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import __main__ as soak_main
from soak import census as soak_census
from soak import payloads as soak_payloads
from soak import sinks as soak_sinks
from soak.debian import SetupError
from soak.sinks import command as soak_sinks_command
from soak.sinks import file as soak_file
from soak.sinks import readback as soak_readback
from soak.sinks import receiver as soak_receiver
from soak.sinks import servers as soak_servers
from soak.tests.helpers import (
    LIMIT,
    ROOT,
    OnTerminal,
    Worker,
    batch_of,
    run_python,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_the_file_sink_writes_an_event_a_line_and_keeps_newlines_out(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events")
    sink.deliver(batch_of(b'{"a":1}', b'{\n"a": 2\n}'))
    sink.deliver(batch_of(b""))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b'{"a":1}\n{ "a": 2 }\n\n'


def test_the_file_sink_writes_lines_that_are_terminated_already_as_they_are(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events", terminated=True)
    sink.deliver(batch_of(b"first\n", b"second\n"))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b"first\nsecond\n"


def test_the_file_sink_begins_a_new_file_before_a_batch_that_is_too_much_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "events"
    sink = soak_file.FileSink(path, rotate_bytes=10, keep=2)
    for i in range(5):
        sink.deliver(batch_of(b"%d..." % i, b"."))
    sink.deliver(batch_of(b"longer than the limit"))
    sink.close()
    assert [file.name for file in soak_file.rotated(path)] == ["events.000004", "events.000005"]
    assert [file.read_bytes() for file in soak_file.rotated(path)] == [b"3...\n.\n", b"4...\n.\n"]
    assert path.read_bytes() == b"longer than the limit\n"

    again = soak_file.FileSink(path, rotate_bytes=10)
    again.deliver(batch_of(b"after a restart"))
    again.close()
    assert soak_file.rotated(path)[-1].name == "events.000006"


class Disk:
    """os.write and os.fsync on a disk that takes so many bytes, one a call, and then has so many failures."""

    def __init__(self, room: int, failures: int) -> None:
        self.room, self.failures, self.synced = room, failures, 0
        self.real = os.write

    def write(self, fd: int, data: bytes) -> int:
        if self.room == 0 and self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        self.room = max(0, self.room - 1)
        return self.real(fd, data[:1])

    def fsync(self, fd: int) -> None:
        self.synced += 1


def test_the_file_sink_goes_on_where_it_was_when_the_disk_has_room_again(tmp_path: Path) -> None:
    disk = Disk(room=4, failures=3)
    sink = soak_file.FileSink(tmp_path / "events", fsync=True)
    with mock.patch.multiple(os, write=disk.write, fsync=disk.fsync), mock.patch("time.sleep"):
        sink.deliver(batch_of(b"first", b"second"))
    sink.close()
    assert (disk.failures, disk.synced) == (0, 1)
    assert (tmp_path / "events").read_bytes() == b"first\nsecond\n"


def test_the_file_sink_takes_half_a_batch_out_again_when_it_gives_up(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events", patience=0.0)
    sink.deliver(batch_of(b"whole"))
    with mock.patch.object(os, "write", Disk(room=4, failures=1).write), pytest.raises(OSError, match="No space"):
        sink.deliver(batch_of(b"half"))
    sink.deliver(batch_of(b"after"))
    sink.close()
    assert (tmp_path / "events").read_bytes() == b"whole\nafter\n"


def test_the_file_sink_does_not_wait_for_what_will_not_pass(tmp_path: Path) -> None:
    sink = soak_file.FileSink(tmp_path / "events")
    broken = mock.patch.object(os, "write", side_effect=OSError(5, "Input/output error"))
    with broken, mock.patch("time.sleep") as sleep, pytest.raises(OSError, match="Input/output"):
        sink.deliver(batch_of(b"x"))
    sink.close()
    assert sleep.call_count == 0


def test_the_sinks_command_says_that_it_was_interrupted(tmp_path: Path, capsys: Any) -> None:
    real = vars(soak_sinks_command)["drive"]

    def drive(*args: Any) -> Any:
        return replace(real(*args), interrupted=True)

    with mock.patch.object(soak_sinks_command, "drive", drive):
        code = soak_main.main(
            ["sinks", "--only", "null,file", "--duration", "0.2s", "--producers", "2", "--out", str(tmp_path)]
        )
    assert code == 1
    assert capsys.readouterr().out.startswith("INTERRUPTED: 1 of 1 loads well")


@pytest.mark.parametrize(("name", "value"), [("rotate_bytes", 0), ("keep", -1)])
def test_the_file_sink_names_a_limit_that_is_none(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1 or None, not {value}"):
        soak_file.FileSink(tmp_path / "events", **{name: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nowhere", "is not a sink"),
        ("ftp://127.0.0.1", "is not a sink"),
        ("file:", "names no file"),
        ("redis:", "names no server"),
        ("http://", "names no server"),
        ("file:x#rotate=heavy", "rotate: 'heavy' is not a size"),
        ("file:x#fsync=perhaps", "fsync: 'perhaps' is neither yes nor no"),
        ("file:x#stream=y", "'stream=y' is no option of such a sink"),
        ("redis://127.0.0.1#maxlen", "'maxlen' is no option"),
        ("redis://127.0.0.1#maxlen=0", "maxlen: '0' is out of range"),
        ("nats://127.0.0.1#timeout=-1", "timeout: '-1' is not a number of seconds"),
    ],
)
def test_a_sink_that_is_none_is_named_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        soak_sinks.parse_sink(text)
    assert repr(text) in str(error.value)


def accepted_and_events() -> tuple[list[soak_census.Account], list[bytes]]:
    """What two producers sent, and the same as one list in which their events alternate."""
    accounts = [soak_census.Account(), soak_census.Account()]
    sources = [soak_payloads.events(None, i, soak_payloads.Sent(None)) for i in range(2)]
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
    ids=[
        "equal",
        "lost",
        "repeated",
        "swapped",
        "interleaved",
        "stranger",
        "torn",
        "never sent",
        "negative",
        "changed",
    ],
)
def test_reading_back_finds_what_is_wrong(
    change: Callable[[list[bytes]], list[bytes]], expected: dict[str, object]
) -> None:
    accounts, events = accepted_and_events()
    found = soak_readback.compare(change(events), accounts, None, once=True, ordered=True)
    kinds = {"lost": 0, "repeated": 0, "out_of_order": 0, "strange": 0, "checksum_equal": True}
    assert {kind: getattr(found, kind) for kind in kinds} == {**kinds, **expected}
    assert len(found.problems) == len(expected)


def test_reading_back_lets_a_sink_repeat_that_says_so_and_small_events_count() -> None:
    accounts, events = accepted_and_events()
    assert soak_readback.compare([*events, events[0]], accounts, None, once=False, ordered=True).problems == []

    account = soak_census.Account()
    for event in (b"1", b"2"):
        account.add(event)
    assert soak_readback.compare([b"2", b"1"], [account], 1, once=True, ordered=True).problems == []
    assert len(soak_readback.compare([b"2"], [account], 1, once=True, ordered=True).problems) == 2


@pytest.mark.parametrize("options", [[], ["--bulk", "50"], ["--on-full", "raise", "--max-buffered-bytes", "64KiB"]])
def test_a_soak_into_files_reads_every_event_back(options: list[str], tmp_path: Path) -> None:
    target = f"file:{tmp_path / 'events'}#rotate=100KiB"
    common = ["--duration", "0.3s", "--producers", "4", "--display", "none", "--out", str(tmp_path / "out")]
    done = run_python("-m", "soak", "run", "--sink", target, *common, *options, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "latest.json").read_text())
    assert result["sink"]["events"] == result["accepted"] > 0
    assert result["sink"]["problems"] == []
    assert len(list(tmp_path.glob("events.*"))) > 1


def test_a_soak_into_a_device_says_that_nothing_can_be_read_back(tmp_path: Path) -> None:
    done = run_python(
        "-m", "soak", "run", "--sink", "file:/dev/null", "--duration", "0.2s", "--out", str(tmp_path), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "latest.json").read_text())["sink"]["read"] is False


def test_a_soak_whose_sink_loses_an_event_fails(tmp_path: Path) -> None:
    target = tmp_path / "events"
    real = soak_file.FileSink.write_lines

    def forgetful(self: soak_file.FileSink, lines: list[bytes]) -> None:
        real(self, lines[1:])

    with mock.patch.object(soak_file.FileSink, "write_lines", forgetful):
        code = soak_main.main(
            ["run", "--sink", f"file:{target}", "--duration", "0.2s", "--display", "none", "--out", str(tmp_path)]
        )
    result = json.loads((tmp_path / "latest.json").read_text())
    assert code == 1
    assert result["lost"] > 0
    assert "accepted events are not there" in result["verdict"]["correctness"]["note"]


def test_a_sink_without_its_package_or_server_is_one_line(tmp_path: Path) -> None:
    nobody = soak_servers.free_port()
    block = f"import sys; sys.modules['redis'] = None; sys.argv[1:] = ['run', '--sink', 'redis://127.0.0.1:{nobody}']\n"
    done = run_python("-c", block + "from soak.__main__ import main; sys.exit(main())", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "needs a package" in line

    pytest.importorskip("redis")
    pytest.importorskip("tenacity")
    done = run_python("-m", "soak", "run", "--sink", f"redis://127.0.0.1:{nobody}", cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"'redis://127.0.0.1:{nobody}' cannot be opened" in line


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\nb", b"a\n" + b"b" * 200_000, b"b" * 200_000])
def test_the_receiver_takes_a_torn_line_out_when_it_starts(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(text)
    soak_receiver.drop_torn(str(path))
    assert path.read_bytes() == text[: text.rfind(b"\n") + 1]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers requests as it is told, and remembers them."""

    protocol_version = "HTTP/1.1"
    codes: list[int]
    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        self.seen.append((self.headers["Idempotency-Key"], body))
        self.send_response(self.codes.pop(0))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def answering(*codes: int) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that answers with these codes; yields its address and what it has seen."""
    seen: list[tuple[str, bytes]] = []
    kind = type("Answering", (Answers,), {"codes": list(codes), "seen": seen})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", seen
        finally:
            server.shutdown()
            thread.join(LIMIT)


@pytest.mark.parametrize("compress", [False, True])
def test_the_http_sink_posts_a_batch_again_under_the_same_key(compress: bool) -> None:
    soak_http = pytest.importorskip("soak.sinks.http", exc_type=ImportError)
    with answering(503, 429, 204, 204) as (url, seen):
        sink = soak_http.HttpSink(url, compress=compress, longest_pause=0.01)
        sink.deliver(batch_of(b"1", b"2"))
        sink.deliver(batch_of(b"3"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n2\n"] * 3 + [b"3\n"]
    assert len({key for key, _ in seen[:3]}) == 1
    assert seen[3][0] != seen[0][0]


def test_the_http_sink_raises_what_will_not_pass() -> None:
    soak_http = pytest.importorskip("soak.sinks.http", exc_type=ImportError)
    with answering(400, 503, 503) as (url, seen):
        sink = soak_http.HttpSink(url, tries=2, longest_pause=0.01)
        with pytest.raises(soak_http.urllib3.exceptions.HTTPError, match="answered 400"):
            sink.deliver(batch_of(b"1"))
        with pytest.raises(soak_http.urllib3.exceptions.HTTPError):
            sink.deliver(batch_of(b"2"))
        sink.close()
    assert [body for _, body in seen] == [b"1\n", b"2\n", b"2\n"]


def test_the_sinks_command_harms_a_server_and_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("urllib3", minversion="2")
    done = run_python(
        *("-m", "soak", "sinks", "--only", "null,http", "--faults", "kill,reset,refuse"),
        *("--duration", "1s", "--producers", "4", "--out", str(tmp_path), "--json", str(tmp_path / "result.json")),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["sink"], row["fault"]): row for row in result["rows"]}
    assert list(rows) == [("null", "none"), *(("http", fault) for fault in ("none", "kill", "reset", "refuse"))]
    for (sink, _), row in rows.items():
        if sink == "http":
            assert row["read"]["lost"] == 0
            assert row["read"]["events"] - row["read"]["repeated"] == row["accepted"] > 0
    assert result["left_out"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_sinks_command_that_is_told_to_end_ends_its_server(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("urllib3", minversion="2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = ("--only", "http", "--faults", "none", "--duration", "10m", "--producers", "2", "--json", os.devnull)
    with OnTerminal("-m", "soak", "sinks", *options) as terminal:
        terminal.read_until("calibration: ")
        wait_until(lambda: list(tmp_path.glob("tempo-sinks-*/http/data/*")), "the server has begun")
        (folder,) = tmp_path.iterdir()
        terminal.send_signal(number)
        assert terminal.exit_code() == 1, terminal.text
    assert "INTERRUPTED" in terminal.text
    assert not folder.exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists()]
    assert not any(os.fsencode(folder) in command for command in commands)


def test_the_sinks_command_leaves_a_server_out_that_cannot_be_had(tmp_path: Path) -> None:
    missing = mock.patch.object(soak_servers, "find", side_effect=SetupError("no apt-get here"))
    with missing, mock.patch.object(soak_sinks_command, "ROUNDS", 1):
        code = soak_main.main(
            ["sinks", "--only", "null,nats", "--duration", "0.2s", "--producers", "2", "--out", str(tmp_path)]
        )
    (file,) = tmp_path.glob("sinks-*.json")
    assert code == 0
    assert json.loads(file.read_text())["left_out"] == ["nats: no apt-get here"]


@pytest.mark.parametrize("arguments", [["--only", "kafka"], ["--faults", "fire"], ["--duration", "0s"]])
def test_a_bad_option_of_the_sinks_command_is_one_line(arguments: list[str]) -> None:
    done = run_python("-m", "soak", "sinks", *arguments, cwd=ROOT)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {arguments[0]}: " in line


def skip_without(program: str, package: str) -> None:
    """Skip the test when a server is neither installed nor in the cache already."""
    with mock.patch.object(soak_servers, "fetch", side_effect=SetupError("not installed")):
        try:
            soak_servers.find(program, package)
        except SetupError:
            pytest.skip(f"no {program} is here (make soak-sinks fetches it)")


@contextlib.contextmanager
def redis_servers(folder: Path, *options: Sequence[str]) -> Iterator[list[soak_servers.Redis]]:
    """A server for each of these options, ended afterwards."""
    pytest.importorskip("redis", minversion="6.1")  # the first whose RedisCluster has transactions
    pytest.importorskip("tenacity")
    skip_without("redis-server", "redis-server")
    with contextlib.ExitStack() as stack:
        servers = [soak_servers.Redis(folder / f"server {i}") for i in range(len(options))]
        for server, more in zip(servers, options):
            server.more = more
            server.make_folder(small=False)
            stack.callback(server.stop)
            server.start()
        yield servers


def in_stream(client: Any, stream: str) -> list[bytes]:
    """The events that are in a stream."""
    return [fields[b"event"] for _, fields in client.xrange(stream)]


def test_the_redis_sink_trims_its_stream(tmp_path: Path) -> None:
    with redis_servers(tmp_path, ()) as (server,):
        redis = importlib.import_module("redis")
        module = importlib.import_module("soak.sinks.redis")
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


def test_the_redis_sink_goes_on_when_a_machine_of_its_cluster_comes_back(tmp_path: Path) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port")
    buses = [soak_servers.free_port() for _ in range(3)]  # where they talk to each other
    with redis_servers(tmp_path, *((*options, str(bus)) for bus in buses)) as servers:
        redis = importlib.import_module("redis")
        module = importlib.import_module("soak.sinks.redis")
        patient = {"socket_timeout": LIMIT, "socket_connect_timeout": LIMIT}
        with contextlib.ExitStack() as stack:
            nodes = [stack.enter_context(redis.Redis(port=server.port, **patient)) for server in servers]
            for i, node in enumerate(nodes):
                node.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * i // 3, 16384 * (i + 1) // 3 - 1)
                node.execute_command("CLUSTER MEET", soak_servers.HOST, servers[0].port, buses[0])

            wait_until(lambda: all(node.cluster("INFO")["cluster_state"] == "ok" for node in nodes))
            cluster = stack.enter_context(redis.RedisCluster(host=soak_servers.HOST, port=servers[0].port, **patient))
            streams = [f"events:{{{i}}}" for i in range(6)]
            assert len({cluster.get_node_from_key(stream).port for stream in streams}) == 3
            sinks = [module.RedisSink(cluster, stream) for stream in streams]
            for i, sink in enumerate(sinks):
                sink.deliver(batch_of(b"%d" % i, b"next"))
            sinks[0]._append(1, [b"0", b"next"])  # the try whose answer was lost
            assert [in_stream(cluster, stream) for stream in streams] == [[b"%d" % i, b"next"] for i in range(6)]

            (away,) = (server for server in servers if server.port == cluster.get_node_from_key(streams[0]).port)
            away.kill()
            tries: list[int] = []
            append = sinks[0]._append

            def counted(*args: Any) -> None:
                tries.append(1)
                append(*args)

            with mock.patch.object(sinks[0], "_append", counted):
                worker = Worker(sinks[0].deliver, batch_of(b"while it was away"))
                wait_until(lambda: len(tries) > 1)
                away.start()
                worker.result()
            assert in_stream(cluster, streams[0]) == [b"0", b"next", b"while it was away"]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        ("redis.ConnectionError('away')", True),
        ("redis.AuthenticationError('invalid password')", False),
        ("redis.exceptions.ClusterDownError('The cluster is down')", True),
        ("redis.exceptions.MovedError('3999 127.0.0.1:6381')", True),
        ("redis.ResponseError('MISCONF Redis is configured to save')", True),
        ("redis.ResponseError('Command # 1 (XADD a) of pipeline caused error: NOREPLICAS Not enough')", True),
        ("redis.ResponseError('Command # 1 (XADD NOREPLICAS) of pipeline caused error: WRONGTYPE')", False),
        ("redis.RedisClusterException('Redis Cluster cannot be connected. Please')", True),
        ("redis.RedisClusterException('shard_hint is deprecated')", False),
        ("ValueError('MISCONF')", False),
    ],
)
def test_the_redis_sink_tries_again_what_may_pass(error: str, transient: bool) -> None:
    redis = pytest.importorskip("redis")
    pytest.importorskip("tenacity")
    module = importlib.import_module("soak.sinks.redis")
    assert module.is_transient(eval(error, {"redis": redis})) is transient


@pytest.mark.parametrize("kind", ["redis", "postgresql", "nats"])
def test_a_batch_whose_acknowledgement_is_lost_is_in_the_server_once(kind: str, tmp_path: Path) -> None:
    """The connection is reset, again and again, while batches are delivered through a relay."""
    for package in {"redis": ["redis"], "postgresql": ["psycopg"], "nats": ["nats"]}[kind] + ["tenacity"]:
        pytest.importorskip(package)
    program, package = {
        "redis": ("redis-server", "redis-server"),
        "postgresql": ("initdb", "postgresql"),
        "nats": ("nats-server", "nats-server"),
    }[kind]
    skip_without(program, package)
    done = run_python(
        *("-m", "soak", "sinks", "--only", kind, "--faults", "reset", "--duration", "1s", "--producers", "4"),
        *("--max-buffered-bytes", "256KiB"),
        *("--out", str(tmp_path), "--json", str(tmp_path / "result.json")),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["fault"], row["read"]["lost"], row["read"]["repeated"]) for row in result["rows"]] == [
        ("none", 0, 0),
        ("reset", 0, 0),
    ]
