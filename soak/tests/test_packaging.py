# SPDX-License-Identifier: MIT
"""Packaging: a typed project that has copied tempo.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from soak.tests.helpers import ROOT, run_python

TYPED = """\
import tempo

class Events(tempo.Dispatcher):
    pass

def handle(batch: tempo.Batch) -> None:
    view: memoryview = batch.data or batch[0] or batch[:1][0] or next(iter(batch))
    some: list[bytes] = batch.tolist()[: len(batch)]

def failed(error: BaseException, batch: tempo.Batch) -> None:
    print(error, batch.tolist())

async def consume(d: tempo.Dispatcher) -> int:
    total: int = sum([batch.nbytes async for batch in d])
    await d.aenqueue(b"a", timeout=1.0)
    async with Events(interval=1, max_buffered_bytes=1) as events:
        own: Events = events
        done: bool = await own.aflush(1.0)
    return total + done

with Events(interval=0.25, max_batch_bytes=None, max_batch_items=500, max_buffered_bytes=4 * tempo.MiB) as d:
    d.start(handle, on_error=failed, exit_timeout=1)
    d.enqueue(memoryview(b"a"), timeout=None)
    count: int = d.enqueue_many([b"b", bytearray(b"c")], 1)
try:
    d.shutdown(timeout=1.0)
except tempo.DrainTimeout as late:
    left: list[tempo.Batch] = late.undelivered
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy --strict", "pyright"])
def test_a_typed_project_passes_with_the_vendored_file(checker: str, tmp_path: Path) -> None:
    name, *options = checker.split()
    pytest.importorskip(name)
    if run_python("-m", name, "--version", cwd=tmp_path).returncode:
        pytest.skip(f"{name} cannot be run: it may need the network once")
    shutil.copy(ROOT / "tempo.py", tmp_path)
    for extra, code in (("", 0), ("d.enqueue('text')\n", 1)):
        (tmp_path / "project.py").write_text(TYPED + extra, encoding="utf-8")
        done = run_python("-m", name, *options, "project.py", "tempo.py", cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
