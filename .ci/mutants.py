# SPDX-License-Identifier: MIT
"""Mutation testing by cosmic-ray (cosmic-ray.toml): does a test fail for each small change of tempo.py?

    python3 .ci/mutants.py [--sample N] [--again] [--jobs N]

Tests the mutants in copies of the tree, and compares those that survive with survivors.txt. The session in .cache/
keeps what is known, so that an interrupted run goes on; it begins again when tempo.py or the configuration changes.
"""

import argparse
import hashlib
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import coverage
import pytest
from cosmic_ray.config import load_config
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / ".ci" / "cosmic-ray.toml"
LISTED = ROOT / ".ci" / "survivors.txt"
SETTINGS = load_config(str(CONFIG))
NEEDED = 95.0
"""Percent of the mutants that must be killed."""
MOST_MEMORY = 6 << 30
"""Bytes of address space: some mutants would take all there is."""

Survivor = tuple[str, str, str]
"""Function, line before and line after."""


def new_session(path: Path) -> None:
    """List the mutants, and mark those that the configuration excludes as skipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    subprocess.run(["cosmic-ray", "init", CONFIG, unfinished], cwd=ROOT, check=True)
    subprocess.run(["cr-filter-operators", unfinished, CONFIG], cwd=ROOT, check=True)
    lines = (ROOT / "tempo.py").read_text(encoding="utf-8").splitlines()
    tuning = set()
    for text in SETTINGS.sub("filters", "tuning")["lines"]:
        found = [number for number, line in enumerate(lines, 1) if line.lstrip().startswith(text)]
        assert found, f"{CONFIG.name}: no line of tempo.py begins with {text!r}"
        tuning.update(found)
    with use_db(str(unfinished)) as db:
        skipped = [item.job_id for item in db.pending_work_items if item.mutations[0].start_pos[0] in tuning]
        db.set_multiple_results(skipped, WorkResult(WorkerOutcome.SKIPPED, "tuning"))
    unfinished.rename(path)


def enter_copy(scratch: str) -> None:
    """Give a worker process a copy of its own of what the tests of tempo.py need."""
    copy = Path(scratch, str(os.getpid()))
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "soak"))
    os.chdir(copy)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


class Recorder:
    """A pytest plugin: how long does each test take, and which lines of tempo.py does it run?"""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=["tempo.py"])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def record() -> tuple[list[str], dict[int, set[str]]]:
    """Run the tests; return them, quickest first, and those that run each line."""
    recorder = Recorder()
    with recorder.coverage.collect():  # which takes memory: a test that measures that may fail here
        pytest.main(["-q", "--tb=no", "test_tempo.py"], plugins=[recorder])
    lines = recorder.coverage.get_data().contexts_by_lineno(str(Path("tempo.py").resolve()))
    return sorted(recorder.seconds, key=recorder.seconds.__getitem__), {n: set(tests) for n, tests in lines.items()}


def command(tests: list[str]) -> str:
    return f"{SETTINGS.test_command} {shlex.join(tests)}"


def test(item: WorkItem, tests: list[str]) -> tuple[str, WorkResult]:
    return item.job_id, mutate_and_test(item.mutations, command(tests), SETTINGS.timeout)


def test_all(db: WorkDB, items: list[WorkItem], jobs: int) -> None:
    """Test the mutants and store the results. Exits when the tests fail without a change."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(jobs, initializer=enter_copy, initargs=(scratch,)) as pool,
    ):
        tests, runs = pool.submit(record).result()
        outcome, output = pool.submit(run_tests, command(tests), SETTINGS.timeout).result()
        if outcome is not TestOutcome.SURVIVED:
            sys.exit(f"{output}\nthe tests fail without a change")
        futures = []
        for item in items:
            # A statement of several lines is on record by some of them.
            line = max(number for number in runs if number <= item.mutations[0].start_pos[0])
            futures.append(pool.submit(test, item, sorted(tests, key=lambda name: name not in runs[line])))
        for number, future in enumerate(as_completed(futures), 1):
            db.set_result(*future.result())
            if number % 50 == 0:
                print(f"{number} of {len(items)} tested", file=sys.stderr, flush=True)


def survivors(db: WorkDB) -> Iterator[Survivor]:
    for item, result in db.completed_work_items:
        if result.test_outcome is TestOutcome.SURVIVED:
            changed = result.diff.splitlines()[3:]
            before, after = (" ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+")
            yield item.mutations[0].definition_name or "module", before, after


def main() -> None:
    parser = argparse.ArgumentParser(description="Test the tests of tempo.py with mutants.")
    parser.add_argument("--sample", type=int, metavar="N", help="only N more mutants, drawn by chance")
    parser.add_argument("--again", action="store_true", help="only those that survived, for instance with new tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at the same time (%(default)s)")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["COVERAGE_CORE"] = "ctrace"  # sys.monitoring, the default from 3.14 on, tells the first test of a line
    os.environ["TEST_LIMIT"] = "10"  # seconds: many mutants hang

    digest = hashlib.sha256((ROOT / "tempo.py").read_bytes() + CONFIG.read_bytes()).hexdigest()
    session = ROOT / ".cache" / "mutants" / f"{digest[:12]}.sqlite"
    if not session.exists():
        new_session(session)
    with use_db(str(session)) as db:
        items = list(db.pending_work_items)
        if options.again:
            items = [item for item, result in db.completed_work_items if result.test_outcome is TestOutcome.SURVIVED]
        if options.sample is not None:
            items = random.sample(items, min(options.sample, len(items)))
        if items:
            test_all(db, items, options.jobs)
        found = list(survivors(db))
        outcomes = Counter(result.test_outcome for _, result in db.results)
        pending = len(list(db.pending_work_items))

    paragraphs = [part.strip().splitlines() for part in LISTED.read_text(encoding="utf-8").split("\n\n")[1:]]
    listed = {(name, before[2:], after[2:]): reason for name, before, after, reason in paragraphs}
    unlisted = [survivor for survivor in found if not listed.get(survivor, "")]
    for name, before, after in unlisted:
        print(f"{name}\n- {before}\n+ {after}\n\n", end="")
    gone = [] if pending else sorted(set(listed) - set(found))
    for name, before, after in gone:
        print(f"listed, but does not survive: {name}: {before}  ->  {after}")
    # Skipped ones have no outcome; one that could not be tested at all is not a killed one.
    tested = outcomes.total() - outcomes[None]
    score = 100 * outcomes[TestOutcome.KILLED] / max(1, tested)
    print(f"{tested} mutants tested, {pending} to go; {score:.1f} % killed ({NEEDED:g} % needed)")
    print(f"{len(found)} survived, {len(unlisted)} of these are not in {LISTED.relative_to(ROOT)}")
    sys.exit(bool(unlisted or gone or score < NEEDED))


if __name__ == "__main__":
    main()
