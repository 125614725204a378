# SPDX-License-Identifier: MIT
"""Recipes: each does what its README says, on the real thing."""

from __future__ import annotations

import ast
import contextlib
import http.client
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.tests.helpers import (
    LIMIT,
    ROOT,
    run_python,
    skip_what_is_not_installed,
    wait_until,
)
from soak.tests.test_spool import in_file

pytestmark = pytest.mark.usefixtures("no_thread_left")


def recipe(heading: str, **instead: str) -> str:
    """The block under a heading in one of the READMEs, with some of its text replaced: each key stands for a place."""
    (source,) = (
        block[1]
        for document in ("README.md", "soak/README.md")
        for section in re.split(r"(?m)^### ", (ROOT / document).read_text(encoding="utf-8"))
        if section.startswith(f"{heading}\n")
        for block in re.finditer(r"(?ms)^```python\n(.*?)^```", section)
    )
    skip_what_is_not_installed(source)
    for place, text in instead.items():
        old = RECIPE_PLACES[place]
        assert source.count(old) == 1, f"the recipe has changed: {old}"
        source = source.replace(old, text)
    return source


RECIPE_PLACES = {
    "send": "    print(batch.tolist())\n",
    "interval": "interval=0.25",
    "limit": "max_buffered_bytes=4 * tempo.MiB",
    "delay": "delay = 0.1\n",
    "limit_of_delay": "delay < 5:",
    "flush": "d.flush(10)\n",
    "enqueue": 'd.enqueue(b"event")',
    "spool_enqueue": 'spool.enqueue(d, b"event")',
    "shutdown": "d.shutdown(timeout=5.0)",
    "run": "asyncio.run(main())",
    "broker": '"test.mock.num.brokers": 1,',
    "log_level": '"log_level": 4,',
    "wait": "producer.flush(10.0)",
}


def printed_batches(text: str) -> list[list[bytes]]:
    """The batches that a recipe printed. Two threads or processes may have done so on one line."""
    lines = text.replace("][b", "]\n[b").splitlines()
    return [ast.literal_eval(line) for line in lines if line.startswith("[b")]


def printed(text: str) -> list[bytes]:
    """Their payloads."""
    return [payload for batch in printed_batches(text) for payload in batch]


def run_recipe(source: str, tmp_path: Path) -> str:
    """Run a recipe that ends well; return what it printed."""
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_recipe_logging_ships_each_record_as_it_was_when_it_was_logged(tmp_path: Path) -> None:
    source = recipe("logging", interval="interval=3600")
    source += """
log = logging.getLogger("app")
changing = [1]
log.error("%s", changing)
changing.append(2)
threads = [threading.Thread(target=log.error, args=("from thread %d", i)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    came = printed(run_recipe(source, tmp_path))
    assert came[:2] == [b"disk 93 % full", b"[1]"]
    assert sorted(came[2:]) == [b"from thread %d" % i for i in range(8)]


def test_recipe_logging_drops_and_counts_what_finds_no_room_and_what_comes_after_the_end(tmp_path: Path) -> None:
    source = recipe("logging", limit="max_buffered_bytes=20", interval="interval=3600")
    source += """
for i in range(3):
    logging.getLogger("app").error("%03d", i)
handler.close()
logging.getLogger("app").error("too late")
print(handler.dispatcher.stats().rejected)
"""
    assert run_recipe(source, tmp_path) == "[b'disk 93 % full', b'000', b'001']\n2\n"


def test_recipe_logging_tells_of_a_record_that_cannot_be_formatted_and_goes_on(tmp_path: Path) -> None:
    source = recipe("logging")
    source += 'logging.getLogger("app").error("%d", "no number")\nlogging.getLogger("app").error("on")\n'
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, printed(done.stdout)) == (0, [b"disk 93 % full", b"on"])
    assert "--- Logging error ---" in done.stderr
    assert "no number" in done.stderr


def test_recipe_logging_ends_when_sending_logs_too(tmp_path: Path) -> None:
    # logging.shutdown holds the handler's lock while close() waits for this.
    noisy = "    print(batch.tolist())\n    logging.getLogger('app').error('sent %d', len(batch))\n"
    source = recipe("logging", send=noisy, interval="interval=3600") + "logging.shutdown()\nprint('down')\n"
    assert run_recipe(source, tmp_path) == "[b'disk 93 % full']\ndown\n"


def test_recipe_logging_says_what_it_could_not_send(tmp_path: Path) -> None:
    stuck = "    entered.set()\n    threading.Event().wait()\n"
    source = recipe("logging", send=stuck, interval="interval=0.001")
    source = source.replace("timeout=5.0", "timeout=0.01")
    source = "import threading\nentered = threading.Event()\n" + source
    source += """
entered.wait()
logging.getLogger("app").error("one")
logging.getLogger("app").error("two")
logging.shutdown()
"""
    done = run_python("-c", source, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "2 log records lost\n")


@contextlib.contextmanager
def served(source: str, folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `python -m COMMAND` as a server of module:app, on a socket that takes connections already; yield its port."""
    (folder / "module.py").write_text(source, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = subprocess.Popen(
            [sys.executable, "-m", *(part.format(fd=listener.fileno()) for part in command), "module:app"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            # gunicorn 27 has a control socket in the user's folder.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
        port = listener.getsockname()[1]
    # Closed here, so that who connects when the server has ended is refused.
    try:
        yield server, port
    finally:
        if server.returncode is None:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too: they hold the pipes
            print(*server.communicate(), sep="\n")  # for the test that has failed


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """Send one request; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        return connection.getresponse().status


def ended(server: subprocess.Popen[str], ending: signal.Signals) -> tuple[list[bytes], str]:
    """End a server; return what it delivered, and told."""
    server.send_signal(ending)
    out, err = server.communicate(timeout=LIMIT)
    assert "Traceback" not in err, err
    return printed(out), err


UVICORN = ("uvicorn", "--fd", "{fd}", "--no-access-log")


@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT], ids=lambda ending: str(ending.name))
def test_recipe_starlette_drains_when_uvicorn_ends(tmp_path: Path, ending: signal.Signals, framework: str) -> None:
    source = recipe("Starlette, FastAPI", interval="interval=3600")
    skip_what_is_not_installed(f"import uvicorn\nimport {framework}")
    if framework == "fastapi":
        source, found = re.subn(r"(?m)^app = Starlette.*$", "app = FastAPI(lifespan=lifespan)", source)
        assert found == 1
        source = f'from fastapi import FastAPI\n{source}\napp.post("/track")(track)\n'
    with served(source, tmp_path, *UVICORN) as (server, port):
        for i in range(20):
            assert ask(port, "POST", "/track", b"event %d" % i) == 202
        came, told = ended(server, ending)
    assert came == [b"event %d" % i for i in range(20)]
    assert "Application shutdown complete" in told


def test_recipe_starlette_answers_503_when_there_is_no_room(tmp_path: Path) -> None:
    source = recipe("Starlette, FastAPI", interval="interval=3600", limit="max_buffered_bytes=10")
    skip_what_is_not_installed("import uvicorn")
    with served(source, tmp_path, *UVICORN) as (server, port):
        statuses = [ask(port, "POST", "/track", body) for body in (b"12345", b"67890", b"x")]
        came, _ = ended(server, signal.SIGTERM)
    assert (statuses, came) == ([202, 202, 503], [b"12345", b"67890"])


@pytest.mark.parametrize(
    ("worker", "preload"),
    [("sync", True), ("sync", False), ("gthread", True), ("gthread", False), ("gevent", True), ("gevent", False)],
)
def test_recipe_gunicorn_drains_each_worker(tmp_path: Path, worker: str, preload: bool) -> None:
    source = recipe("gunicorn", interval="interval=3600")
    skip_what_is_not_installed("import gunicorn" + ("\nimport gevent" if worker == "gevent" else ""))
    # A worker that is told to end while it is still being set up may not hear it.
    hook = "import os\ndef post_worker_init(worker):\n    open(f'{os.getpid()}.ready', 'w').close()\n"
    (tmp_path / "gunicorn.conf.py").write_text(hook, encoding="utf-8")
    command = ("gunicorn", "--bind", "fd://{fd}", "--workers", "2", "--worker-class", worker, "--threads", "2")
    with served(source, tmp_path, *command, *(["--preload"] if preload else [])) as (server, port):
        for i in range(20):
            assert ask(port, "GET", f"/event-{i:02d}") == 202
        wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        came, _ = ended(server, signal.SIGTERM)
    assert server.returncode == 0
    assert sorted(came) == [b"/event-%02d" % i for i in range(20)]


def test_recipe_asyncio_waits_for_room_and_the_loop_goes_on(tmp_path: Path) -> None:
    # The consumer runs in the same loop: a put that blocked it would never find room.
    check = """
async def check():
    d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=30)
    came = []

    async def produce(name):
        for i in range(20):
            await put(d, b"%d-%02d" % (name, i))

    async def consume():
        async for batch in d:
            came.extend(batch.tolist())

    consumer = asyncio.create_task(consume())
    await asyncio.gather(*(produce(name) for name in range(5)))
    await asyncio.to_thread(d.shutdown, 5.0)
    await consumer
    print(d.stats().rejected > 0, all([x for x in came if x[:1] == b"%d" % name] == [
        b"%d-%02d" % (name, i) for i in range(20)] for name in range(5)), len(came))

    d = tempo.Dispatcher(interval=0.01, max_buffered_bytes=30)
    d.enqueue(bytes(30))
    try:
        await put(d, b"no room", timeout=0.01)
    except tempo.QueueFull:
        print([len(batch) for batch in d.stop()])

asyncio.run(check())
"""
    assert run_recipe(recipe("asyncio: a coroutine waits for room", run=check), tmp_path) == "True True 100\n[1]\n"
    came = printed(run_recipe(recipe("asyncio: a coroutine waits for room"), tmp_path))
    assert sorted(came) == [b"event %03d" % i for i in range(500)]


def test_recipe_several_consumers_share_the_work_and_one_error_ends_none(tmp_path: Path) -> None:
    source = recipe("Several consumers")
    batches = printed_batches(run_recipe(source, tmp_path))
    numbers = [[int(payload.split()[1]) for payload in batch] for batch in batches]
    assert all(batch == list(range(batch[0], batch[0] + len(batch))) for batch in numbers)
    assert sorted(number for batch in numbers for number in batch) == list(range(1000))
    # Each consumer meets errors: if they ended by them, nobody would be left to drain. One has its batch when shutdown
    # has returned, and is waited for.
    sending = """while b"event 999" in batch.tolist() and d.stats().state != "stopped":
        pass
    raise OSError("away")"""
    assert source.count("print(batch.tolist(), flush=True)") == 1
    source = source.replace("print(batch.tolist(), flush=True)", sending)
    source += "assert not any(consumer.is_alive() for consumer in consumers)\n"
    source += "print([exc.args for exc, _ in failed[:1]], sum(len(batch) for _, batch in failed))\n"
    assert run_recipe(source, tmp_path) == "[('away',)] 1000\n"


ATTEMPTS = """
import threading

attempts = []

def attempt(batch):
    attempts.append((threading.current_thread(), batch.tolist()))
    if len(attempts) <= FAILING:
        raise ERROR("away")
"""


def attempted(failing: int, error: str) -> str:
    """What a recipe needs to send as often as is told before it succeeds."""
    return ATTEMPTS.replace("FAILING", str(failing)).replace("ERROR", error)


@pytest.mark.parametrize(
    ("failing", "error", "attempts", "given_up"),
    [
        (3, "OSError", ["event"] * 4 + ["next"], []),
        (1, "ValueError", ["event", "next"], ["ValueError: event"]),
        (99, "OSError", ["event"] * 6 + ["next"] * 6, ["OSError: event", "OSError: next"]),
    ],
    ids=["until_it_succeeds", "not_what_cannot_be_mended", "not_for_ever"],
)
def test_recipe_retries_in_order(
    tmp_path: Path, failing: int, error: str, attempts: list[str], given_up: list[str]
) -> None:
    source = recipe(
        "Retries with backoff",
        send="    attempt(batch)\n",
        delay="delay = 0.0005\n",
        limit_of_delay="delay < 0.01:",
        enqueue='d.enqueue(b"event")\nd.flush(10)\nd.enqueue(b"next")',
    )
    source = attempted(failing, error) + source
    source += """
print([payload.decode() for _, payloads in attempts for payload in payloads])
print([f"{type(exc).__name__}: {bytes(batch.data).decode()}" for exc, batch in given_up])
print(len({thread for thread, _ in attempts}), threading.main_thread() in {thread for thread, _ in attempts})
"""
    assert run_recipe(source, tmp_path) == f"{attempts}\n{given_up}\n1 False\n"


def test_recipe_retries_end_when_the_program_does(tmp_path: Path) -> None:
    source = recipe(
        "Retries with backoff",
        send="    failed.set()\n    raise OSError('away')\n",
        delay="delay = 3600.0\n",
        limit_of_delay="True:",
        flush="failed.wait()\n",
    )
    source = f"import threading\nfailed = threading.Event()\n{source}print([len(batch) for _, batch in given_up])\n"
    assert run_recipe(source, tmp_path) == "[1]\n"


def test_recipe_kafka_returns_when_the_broker_has_all(tmp_path: Path) -> None:
    source = recipe("Kafka", log_level='"log_level": 4, "queue.buffering.max.messages": 10,')  # fewer than the events
    source += """
(broker,) = producer.list_topics(timeout=10).brokers.values()
consumer = confluent_kafka.Consumer({
    "bootstrap.servers": f"{broker.host}:{broker.port}", "group.id": "check", "auto.offset.reset": "earliest",
})
consumer.assign([
    confluent_kafka.TopicPartition("events", partition, confluent_kafka.OFFSET_BEGINNING)
    for partition in producer.list_topics("events", timeout=10).topics["events"].partitions
])
came = []
while len(came) < 100:
    message = consumer.poll(20.0)
    assert message is not None and message.error() is None, message and message.error()
    came.append(message.value())
consumer.close()
print(sorted(came) == sorted(b"event %d" % i for i in range(100)), d.stats().failed)
"""
    assert run_recipe(source, tmp_path) == "True 0\n"


def test_recipe_kafka_raises_when_the_broker_has_not_all(tmp_path: Path) -> None:
    source = recipe("Kafka", broker="", log_level='"log_level": 0,', wait="producer.flush(0.01)")
    for old, new in (("ignored.invalid:9092", "127.0.0.1:9"), ("d.start(send)", "d.start(send, on_error=tell)")):
        source = source.replace(old, new)
    source = "def tell(exc, batch):\n    print(exc, len(batch))\n\n" + source
    source += "import os, sys\nsys.stdout.flush()\nos._exit(0)  # else librdkafka goes on trying\n"
    assert run_recipe(source, tmp_path) == "Kafka has not all of 100 events: out of time 100\n"


def test_recipe_fallback_keeps_what_failed_for_the_next_run(tmp_path: Path) -> None:
    heading = "A durable fallback"
    run_recipe(attempted(99, "OSError") + recipe(heading, send="    attempt(batch)\n"), tmp_path)
    assert in_file(tmp_path / "events.spool") == [b"event"]
    more = 'spool.enqueue(d, b"more")'
    assert printed(run_recipe(recipe(heading, spool_enqueue=more), tmp_path)) == [b"event", b"more"]
    assert in_file(tmp_path / "events.spool") == []


def test_recipe_fallback_takes_what_finds_no_room_and_what_a_drain_leaves(tmp_path: Path) -> None:
    source = recipe(
        "A durable fallback",
        send="    entered.set()\n    threading.Event().wait()\n",
        interval="interval=0.001",
        limit="max_buffered_bytes=4",
        spool_enqueue='spool.enqueue(d, b"lost")\nentered.wait()\n'
        'print([spool.enqueue(d, record) for record in (b"1", b"2", b"3456", b"7")])\n',
        shutdown="d.shutdown(timeout=0.01)",
    )
    source = "import threading\nentered = threading.Event()\n" + source
    assert run_recipe(source, tmp_path) == "[True, True, False, True]\n"
    assert in_file(tmp_path / "events.spool") == [b"3456", b"1", b"2", b"7"]
