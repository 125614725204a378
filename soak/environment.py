# SPDX-License-Identifier: MIT
"""Where a figure comes from: machine, interpreter, commit; and how much memory this process takes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import tempo

try:
    import resource
except ImportError:  # not on Windows
    HAS_RESOURCE = False
else:
    HAS_RESOURCE = True

ROOT = Path(__file__).resolve().parent.parent

EMULATED = "SOAK_EMULATED_MACHINE"
"""The environment variable with which ``pi`` names what is emulated: /proc and /sys are the host's."""


def describe() -> dict[str, object]:
    """Return what a reader must know about a figure; None where the machine does not tell."""
    gil = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    implementation = platform.python_implementation()
    return {
        "machine": machine(),
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": _memory(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "interpreter": f"{implementation} {sys.version_info[0]}.{sys.version_info[1]}{'' if gil else ', no GIL'}",
        "build": " ".join(platform.python_build()),
        "compiler": platform.python_compiler(),
        "tempo": tempo.__version__,
        "commit": _commit(),
    }


LINE_KEYS = ("machine", "cores", "interpreter", "python", "build", "commit")


def line(place: Mapping[str, object]) -> str:
    """Return what a figure must never be shown without."""
    commit = str(place["commit"] or "unknown")
    return (
        f"{place['machine']}, {place['cores']} cores, {place['interpreter']} ({place['python']}, {place['build']}),"
        f" commit {commit[:12]}{'-dirty' * commit.endswith('-dirty')}"
    )


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone tells
        return os.cpu_count() or 1


def machine() -> str:
    """Return the machine's model: from the device tree (Raspberry Pi), else from DMI (PC), else what is known."""
    if EMULATED in os.environ:
        return os.environ[EMULATED]
    model = _read("/proc/device-tree/model")
    if model:
        return model
    dmi = " ".join(filter(None, (_read(f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))))
    return dmi or ", ".join(filter(None, (f"{platform.system()} {platform.machine()}", _cpu())))


def peak_rss() -> int | None:
    """Return the most memory that this process ever had resident, in bytes."""
    if not HAS_RESOURCE:
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
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or None


def _memory() -> int | None:
    if EMULATED in os.environ:
        return None  # what there is, is the host's
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """Return the commit that git names for this tree, marked when tempo.py or soak/ differ from it."""
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=5, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "tempo.py", "soak"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("-dirty" if changed else "")
