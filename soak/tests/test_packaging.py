# SPDX-License-Identifier: MIT
"""Packaging: a typed project that has copied tempo.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from soak.tests.helpers import ROOT, run_python

pytestmark = pytest.mark.usefixtures("no_thread_left")


TYPED = """\
from __future__ import annotations

import asyncio
from collections.abc import Iterator

import tempo


def handle(batch: tempo.Batch) -> None:
    data: memoryview = batch.data
    first: memoryview = batch[0]
    some: list[bytes] = batch.tolist()[:2]
    views: Iterator[memoryview] = iter(batch)
    print(len(batch), batch.nbytes, data, first, some, next(views))


def failed(error: BaseException, batch: tempo.Batch) -> None:
    print(error, batch.tolist())


async def consume(d: tempo.Dispatcher) -> int:
    await d.aenqueue(b"a", timeout=1.0)
    flushed: bool = await d.aflush(1.0)
    total: int = 0
    async with d:
        async for batch in d:
            total += batch.nbytes
    return total + flushed


d: tempo.Dispatcher = tempo.Dispatcher(interval=0.25, max_batch_items=500, max_buffered_bytes=4 * tempo.MiB)
d.start(handle, on_error=failed)
d.enqueue(b"a", timeout=1.0)
d.enqueue(memoryview(b"a"))
d.enqueue(bytearray(b"a"), timeout=None)
d.enqueue_many([b"b", b"c"])
done: bool = d.flush(timeout=1.0)
stats: tempo.Stats = d.stats()
try:
    d.shutdown(timeout=1.0)
except tempo.DrainTimeout as late:
    left: list[tempo.Batch] = list(late.undelivered)
print(asyncio.run(consume(d)), stats.accepted)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("checker", "options"), [("mypy", ["--strict"]), ("pyright", [])])
def test_a_typed_project_passes_with_the_vendored_file(checker: str, options: list[str], tmp_path: Path) -> None:
    pytest.importorskip(checker)
    if run_python("-m", checker, "--version", cwd=tmp_path).returncode:
        pytest.skip(f"{checker} cannot be run: it may need the network once")
    shutil.copy(ROOT / "tempo.py", tmp_path)
    (tmp_path / "project.py").write_text(TYPED, encoding="utf-8")
    done = run_python("-m", checker, *options, "project.py", "tempo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    (tmp_path / "project.py").write_text(TYPED + "d.enqueue('text')\n", encoding="utf-8")
    done = run_python("-m", checker, *options, "project.py", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("error") >= 1
