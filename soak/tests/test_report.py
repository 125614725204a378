# SPDX-License-Identifier: MIT
"""The report: one page that needs nothing else, whatever the result holds."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import charts
from soak.__main__ import main

PLACE = {"machine": "a machine", "cores": 2, "interpreter": "CPython 3.11", "python": "3.11.2", "commit": "c" * 40}
RESULT = """{
  "schema": 1, "started": "2026-11-24T12:00:00+0000", "interrupted": false, "samples": "samples.jsonl",
  "delivered_per_second": 500000.0, "delivered": 10000000, "lost": 0, "duplicated": 0, "rejected": 0,
  "load_seconds": 20.0, "drain_seconds": 0.0007, "shutdown_seconds": 0.00006, "problems": [],
  "calibration": 1000000.0, "ratio": 0.5, "baseline": null, "peak_heap_bytes": 2700000, "peak_rss_bytes": 45000000,
  "latency_seconds": {"p50": 0.02, "p99": 0.05, "max": 0.1, "samples": 9},
  "heap": {"bound_bytes": 3500000, "allowance_bytes": 300000, "peak_buffered_bytes": 2000000, "seconds": 2},
  "stats": {"peak_buffered_bytes": 2000000},
  "config": {"producers": 32, "consumers": 1, "max_buffered_bytes": 2097152, "on_full": "block"}
}"""
WITHOUT_MATPLOTLIB: dict[str, None] = {"matplotlib": None, "matplotlib.figure": None}


def write_run(folder: Path, samples: Sequence[dict[str, Any]] = (), **changes: Any) -> Path:
    """Write a made-up result of `soak run`, and its samples; return the result's path."""
    result: dict[str, Any] = {**json.loads(RESULT), "environment": PLACE}
    parts = ("correctness", "throughput", "memory", "drain", "overall")
    result["verdict"] = {part: {"status": "pass", "note": "well"} for part in parts}
    lines = [json.dumps(line) for line in ({"type": "header", "started": result["started"]}, *samples)]
    lines.append('{"type": "sam')  # cut off by a kill
    (folder / result["samples"]).write_text("\n".join(lines), encoding="utf-8")
    path = folder / "result.json"
    path.write_text(json.dumps({**result, **changes}), encoding="utf-8")
    return path


def some_samples(number: int) -> list[dict[str, Any]]:
    fill = {"buffered_bytes": 1 << 20, "rejected": 0, "rss_bytes": 45_000_000, "waiting_producers": 3}
    return [{"type": "sample", "elapsed": float(i), "delivered": 500_000 * i, **fill} for i in range(1, number + 1)]


def report(path: Path, picture: bytes | None = b"picture") -> tuple[str, list[str], list[str]]:
    """Make a report, with the one picture not drawn; return its text, its tags, and the words in its body."""
    pytest.importorskip("jinja2")
    with mock.patch.object(charts, "png", return_value=picture) if picture else contextlib.nullcontext():
        assert main(["report", "--run", str(path), "--out", str(path.parent / "made")]) == 0
    text = (path.parent / "made" / "report.html").read_text(encoding="utf-8")
    body = re.split("<[^>]*>", text.split("<body>")[1])
    return text, re.findall(r"<[^>]*>", text), [html.unescape(words).strip() for words in body if words.strip()]


def test_a_report_is_one_page_that_begins_with_the_verdict_and_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nasty = "<script>alert('&')</script>\ud800\n$x^2$ \U0001f600"
    verdicts = {part: {"status": "fail", "note": nasty} for part in ("correctness", "overall")}
    path = write_run(tmp_path, some_samples(300), verdict=verdicts, environment={**PLACE, "machine": nasty})
    text, tags, words = report(path, picture=None)
    assert words[0] == "\u2717 FAIL" and "300 samples" in text
    assert any("<script>alert('&')</script>" in line for line in words)
    assert tags.count("<picture>") == tags.count("<figcaption>") == 6
    images = re.findall('(?:href|src|srcset)="([^"]*)"', "".join(tags))
    assert len(images) == 12 and all(image.startswith("data:image/svg+xml;base64,") for image in images)
    assert not re.search("<script|<link|https?:|@import", text) and len(text) < 500 * 1024
    assert (tmp_path / "made" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_run_that_came_to_nothing_says_so(tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("ratio", "peak_heap_bytes", "stats", "drain_seconds"))
    nothing["latency_seconds"] = {"p50": None, "p99": None, "max": None, "samples": 0}
    verdicts = {part: {"status": "fail", "note": "not drained"} for part in ("overall", "drain")}
    _, _, words = report(write_run(tmp_path, interrupted=True, verdict=verdicts, **nothing))
    assert words[:2] == ["\u2717 FAIL", "not drained (interrupted)"]
    assert words.count("not measured") >= 4
    assert any("Nothing over time" in line for line in words)


def test_a_report_without_matplotlib_has_no_charts_and_says_so_in_one_line(tmp_path: Path, capsys: Any) -> None:
    with mock.patch.dict(sys.modules, WITHOUT_MATPLOTLIB):
        _, tags, words = report(write_run(tmp_path, some_samples(5)), picture=None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib is not installed" in line
    assert "<picture>" not in tags and "500,000" in words
    assert os.listdir(tmp_path / "made") == ["report.html"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--run missing.json", 1, "cannot read 'missing.json': No such file or directory"),
        ("--run .", 1, "cannot read '.': Is a directory"),
        ("--run other.json", 1, "'other.json' is no result of `soak run`"),
        ("--run later.json", 1, "'later.json' has schema 2"),
        ("--out full", 1, "cannot write 'full/report.html': "),
        ("--open", 2, "--open"),
    ],
)
def test_an_error_of_the_report_is_one_line(
    options: str, code: int, words: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    (tmp_path / "other.json").write_bytes(b"\xff{")
    (tmp_path / "later.json").write_text(
        '{"schema": 2, "verdict": {}, "config": {}, "environment": {}, "samples": ""}', "utf-8"
    )
    (tmp_path / "full" / "report.html").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    drawn = mock.patch.multiple(charts, svg=mock.Mock(return_value=""), png=mock.Mock(return_value=b""))
    with drawn, contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():
        assert main(["report", "--run", "result.json", "--out", "made", *options.split()]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.usefixtures("short_passes")
def test_a_report_of_a_run_has_its_figures_and_samples(tmp_path: Path) -> None:
    main(["run", "--duration", "0.1s", "--producers", "2", "--out", str(tmp_path), "--baseline", "none"])
    with mock.patch.object(charts, "svg", return_value=""):
        text, _, words = report(tmp_path / "latest.json")
    result = json.loads((tmp_path / "latest.json").read_text(encoding="utf-8"))
    assert f"{result['delivered_per_second']:,.0f}" in words
    assert "Nothing over time" not in text
