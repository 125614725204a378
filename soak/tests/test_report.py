# SPDX-License-Identifier: MIT
"""The report: one page that needs nothing else, whatever the result holds."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from soak import charts, environment
from soak.__main__ import main
from soak.config import Config


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    with mock.patch.object(Config, "pass_seconds", return_value=0.1):
        options = ("--duration", "0.1s", "--producers", "2", "--baseline", "none", "--settings", "none")
        assert main(["run", *options, "--out", str(folder)]) == 0
    return folder


def changed(ran: Path, folder: Path, samples: int, **changes: Any) -> Path:
    """Write the run's result with some changes, and so many made-up samples; return the result's path."""
    result = {**json.loads((ran / "latest.json").read_text(encoding="utf-8")), **changes}
    fill = {"type": "sample", "buffered_bytes": 1 << 20, "rejected": 0, "rss_bytes": 1 << 25, "waiting_producers": 3}
    lines = (ran / result["samples"]).read_text(encoding="utf-8").splitlines()[:1]
    lines += [json.dumps({"elapsed": float(i), "delivered": 500_000 * i, **fill}) for i in range(1, samples + 1)]
    (folder / result["samples"]).write_text("\n".join([*lines, '{"type": "sam']), encoding="utf-8")  # cut off by a kill
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder / "result.json"


def report(path: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Make a report; return its text, its tags, and the words in its body."""
    pytest.importorskip("jinja2")
    assert main(["report", "--run", str(path), "--out", str(folder / "made")]) == 0
    text = (folder / "made" / "report.html").read_text(encoding="utf-8")
    body = re.split("<[^>]*>", text.split("<body>")[1])
    return text, re.findall(r"<[^>]*>", text), [html.unescape(words).strip() for words in body if words.strip()]


def test_a_report_is_one_page_that_begins_with_the_verdict_and_needs_nothing_else(ran: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nasty = "<script>alert('&')</script>\ud800\n$x^2$ \U0001f600"
    verdicts = {part: {"status": "fail", "note": nasty} for part in ("correctness", "overall")}
    place = {**environment.describe(), "machine": nasty}
    text, tags, words = report(changed(ran, tmp_path, 300, verdict=verdicts, environment=place), tmp_path)
    assert words[0] == "\u2717 FAIL" and "300 samples" in text
    assert any("<script>alert('&')</script>" in line for line in words)
    assert tags.count("<picture>") == tags.count("<figcaption>") == 6
    images = re.findall('(?:href|src|srcset)="([^"]*)"', "".join(tags))
    assert len(images) == 12 and all(image.startswith("data:image/svg+xml;base64,") for image in images)
    assert not re.search("<script|<link|https?:|@import", text) and len(text) < 500 * 1024
    assert (tmp_path / "made" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_run_that_came_to_nothing_says_so(ran: Path, tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("ratio", "peak_heap_bytes", "stats", "drain_seconds"))
    nothing["latency_seconds"] = {"p50": None, "p99": None, "max": None, "samples": 0}
    verdicts = {part: {"status": "fail", "note": "not drained"} for part in ("overall", "drain")}
    path = changed(ran, tmp_path, 0, interrupted=True, verdict=verdicts, **nothing)
    with mock.patch.multiple(charts, svg=mock.Mock(return_value=""), png=mock.Mock(return_value=b"")):
        _, _, words = report(path, tmp_path)
    assert words[:2] == ["\u2717 FAIL", "not drained (interrupted)"]
    assert words.count("not measured") >= 4
    assert any("Nothing over time" in line for line in words)


def test_a_report_without_matplotlib_has_the_figures_and_says_so(ran: Path, tmp_path: Path, capsys: Any) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}):
        text, tags, words = report(ran / "latest.json", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib is not installed" in line
    result = json.loads((ran / "latest.json").read_text(encoding="utf-8"))
    assert f"{result['delivered_per_second']:,.0f}" in words and "Nothing over time" not in text
    assert "<picture>" not in tags and os.listdir(tmp_path / "made") == ["report.html"]


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
    options: str, code: int, words: str, ran: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(ran, tmp_path, 0, schema=2).rename(tmp_path / "later.json")
    changed(ran, tmp_path, 0)
    (tmp_path / "other.json").write_bytes(b"\xff{")
    (tmp_path / "full" / "report.html").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    drawn = mock.patch.multiple(charts, svg=mock.Mock(return_value=""), png=mock.Mock(return_value=b""))
    with drawn, contextlib.suppress(SystemExit) if code == 2 else contextlib.nullcontext():
        assert main(["report", "--run", "result.json", "--out", "made", *options.split()]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
