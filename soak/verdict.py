# SPDX-License-Identifier: MIT
"""Pass, warn or fail, each with a note that says why. Plain functions of plain figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from soak.cli import format_seconds, format_size

PASS, WARN, FAIL = "pass", "warn", "fail"
DRAIN_WARN, DRAIN_FAIL = 0.5, 5.0  # seconds

Known = tuple[str, float, float] | None  # of a baseline: its name, its figure, and how far from that a run may be


class Finding(NamedTuple):
    status: str
    note: str


def judge_correctness(
    *, problems: Sequence[str], lost: int, duplicated: int, rejected: int, on_full: str, remarks: Iterable[str] = ()
) -> Finding:
    """Fail on anything lost, repeated, refused although producers wait for room, or otherwise wrong.

    ``problems`` are one line each; ``remarks`` say what could not be checked.
    """
    wrong = [f"{lost:,} events lost, {duplicated:,} duplicated"] if lost or duplicated else []
    if rejected and on_full == "block":
        wrong.append(f"{rejected:,} events refused although producers wait for room")
    wrong += problems[:3]
    if len(problems) > 3:
        wrong.append(f"and {len(problems) - 3} more problems")
    if wrong:
        return Finding(FAIL, "; ".join(wrong))
    refused = f"; {rejected:,} refused, none of them delivered" if rejected else ""
    return Finding(PASS, "; ".join([f"every accepted event delivered once{refused}", *remarks]))


def judge_throughput(rate: float, ratio: float | None, known: Known, note: str = "no baseline") -> Finding:
    """Compare a ratio (rate over calibration) with a baseline; ``note``: why there is none, or how it differs.

    Without a baseline, events that flow at all pass.
    """
    if rate <= 0:
        return Finding(FAIL, "nothing was delivered")
    if known is None:
        return Finding(PASS, note)
    name, expected, spread = known
    against = f"{name}: {expected:.3f} +- {spread:.3f}" + (f" ({note})" if note else "")
    if ratio is None:
        return Finding(WARN, f"not calibrated, so not compared with {against}")
    if ratio < expected - spread:
        return Finding(FAIL, f"ratio {ratio:.3f} is below the baseline {against}")
    better = "above" if ratio > expected + spread else "within"
    return Finding(PASS, f"ratio {ratio:.3f} is {better} the baseline {against}")


def judge_memory(peak: int | None, bound: int, allowance: int, known: Known = None, *, late: bool = False) -> Finding:
    """Compare the traced peak with the bound (bytes), what the harness may take in addition, and a baseline.

    late: CPython frees payloads late, as its builds without a GIL do: what is over the bound is a warning.
    """
    if peak is None:
        return Finding(WARN, "not measured: this interpreter has no tracemalloc")
    measured = f"peak heap {format_size(peak)}"
    if peak <= bound:
        return _against(Finding(PASS, f"{measured}, bound {format_size(bound)}"), peak, known, format_size)
    limit = f"bound {format_size(bound)} and {format_size(allowance)} for the harness"
    if peak > bound + allowance:
        why = ": on builds without a GIL CPython frees payloads late" if late else ""
        return Finding(WARN if late else FAIL, f"{measured} is over {limit}{why}")
    return _against(Finding(WARN, f"{measured} is within {limit}, but only with that"), peak, known, format_size)


def judge_drain(seconds: float | None, known: Known = None) -> Finding:
    """Judge the time from "all producers stopped" to "all delivered"; None is a drain that did not come to its end."""
    if seconds is None:
        return Finding(FAIL, "not drained")
    note = f"drained in {format_seconds(seconds)}"
    if seconds > DRAIN_FAIL:
        return Finding(FAIL, f"{note}, over {DRAIN_FAIL:.0f} s")
    finding = Finding(WARN, f"{note}, over {DRAIN_WARN} s") if seconds > DRAIN_WARN else Finding(PASS, note)
    return _against(finding, seconds, known, format_seconds)


def _against(finding: Finding, value: float, known: Known, text: Callable[[float], str]) -> Finding:
    """Fail when the value is above what the baseline allows."""
    if known is None or value <= known[1] + known[2]:
        return finding
    name, expected, spread = known
    return Finding(FAIL, f"{finding.note}: above the baseline {name}: {text(expected)} +- {text(spread)}")


def overall(findings: Mapping[str, Finding]) -> Finding:
    """Return the worst of ``findings``, naming those that are not a pass."""
    worst = max((finding.status for finding in findings.values()), key=(PASS, WARN, FAIL).index)
    short = [f"{name} {finding.status}" for name, finding in findings.items() if finding.status != PASS]
    return Finding(worst, ", ".join(short) or "all pass")
