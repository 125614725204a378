# SPDX-License-Identifier: MIT
"""Where a figure comes from: machine, interpreter, commit; and how much memory this process takes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATED = "SOAK_EMULATED_MACHINE"
"""The environment variable with which ``pi`` names what is emulated: /proc and /sys are the host's."""


def describe() -> dict[str, object]:
    """Return what a reader must know about a figure; None where the machine does not tell."""
    gil = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    implementation = platform.python_implementation()
    return {
        "machine": machine(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": _memory(),
        "python": platform.python_version(),
        "interpreter": f"{implementation} {sys.version_info[0]}.{sys.version_info[1]}{'' if gil else ', no GIL'}",
        "build": " ".join(platform.python_build()),
        "compiler": platform.python_compiler(),
        "commit": _commit(),
    }


def line(place: Mapping[str, object]) -> str:
    """Return what a figure must never be shown without."""
    commit = str(place["commit"] or "unknown")
    return (
        f"{place['machine']}, {place['cores']} cores, {place['interpreter']} ({place['python']}, {place['build']}),"
        f" commit {commit[:12]}{'-dirty' * commit.endswith('-dirty')}"
    )


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone tells
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine() -> str:
    """Return the machine's model: from the device tree (Raspberry Pi), else from DMI (PC), else what is known."""
    dmi = (_read(f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    model = os.environ.get(EMULATED) or _read("/proc/device-tree/model") or " ".join(filter(None, dmi))
    return model or ", ".join(filter(None, (f"{platform.system()} {platform.machine()}", _cpu())))


def peak_rss() -> int | None:
    """Return the most memory that this process ever had resident, in bytes; None on Windows."""
    try:
        import resource  # noqa: PLC0415
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but there


def current_rss() -> int | None:
    """Return the resident memory now, in bytes; None where there is no /proc."""
    fields = _read("/proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip(" \t\r\n\0")
    except OSError:
        return ""


def _cpu() -> str | None:
    pairs = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
    models = [value.strip() for key, _, value in pairs if key.strip() in ("model name", "Model")]
    return models[0] if models else platform.processor() or None


def _memory() -> int | None:
    if EMULATED in os.environ or not hasattr(os, "sysconf"):
        return None  # what there is, is the host's
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str | None:
    """Return the commit that git names for this tree, marked when tempo.py or soak/ differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--", "tempo.py", "soak"))
    except (OSError, subprocess.SubprocessError):
        return None
