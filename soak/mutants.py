# SPDX-License-Identifier: MIT
"""The ``mutants`` command: does a test fail when a line of tempo.py is changed?

cosmic-ray says where tempo.py can be changed and what it reads then; the changed file is tested in a copy of the tree,
never in the tree itself. A mutant is killed when a test fails or hangs. One that survives is a test that is missing,
or a change that changes nothing: those are listed in ``baselines/mutants/survivors.json``, each with its reason.

The tests go in stages, the short ones first, so that most mutants are killed within seconds; how long each takes,
and which functions of tempo.py it calls, two runs without a change tell. A mutant is tried by the tests that call the
function it is in, and first by those that have killed others there. This file is also the pytest plugin that does so
(``pytest -p soak.mutants``).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import faulthandler
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # not on Windows
    HAS_RESOURCE = False
else:
    HAS_RESOURCE = True

ROOT = Path(__file__).resolve().parent.parent
LISTED = ROOT / "soak" / "baselines" / "mutants" / "survivors.json"
STATE = ROOT / "soak" / "out" / "mutants.jsonl"
"""What an interrupted run has found out."""
MOST = 100_000
"""Workers, or mutants of a sample."""
TARGET = 95.0
"""Percent of the mutants that must be killed."""

OPERATORS = (
    # Conditions: the other way round; one part of them for the whole.
    "AddNot",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    # Comparisons: off by one, or the other way round.
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    # Arithmetic: the inverse operation. The other ten replacements of each are noticed by the same tests.
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_FloorDiv",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_LShift_RShift",
    "ReplaceBinaryOperator_RShift_LShift",
    "ReplaceUnaryOperator_USub_UAdd",
    # Numbers: one more; of a 1 one less, too.
    "NumberReplacer",
    # Ways through the code.
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ZeroIterationForLoop",
    "ExceptionReplacer",
)
"""Those of cosmic-ray's operators that are applied. Left out beside the other replacements is RemoveDecorator: there is
none here but property, overload and those of the standard library."""

CHECKERS = ("Dispatcher._check_locked",)
"""Functions that are not changed: they are there for tests, and what fails when one is wrong is the check itself."""

LEFT_OUT = re.compile(
    r"soak|benchmark|_comparison_|_verdict|peer|pyperf|_ratio_|_table_|tracemalloc|_readme|hostile|twin|mutant|"
    r"_mix_is_|events_of_one_size|_(sizes|times)_are_|without_a_file"
)
"""Tests of the harness and of what is written, which say nothing about tempo.py that others do not say sooner, and the
hostile cases, which take minutes."""

SHARES = (0.03, 0.12, 0.5, 1.0)
"""Of all the time that the tests take, from the shortest to the longest: where each stage ends."""
WAIT = 4.0
"""Seconds that a test waits for something that must come, instead of its usual 20: mutants hang often."""
HANG, HANG_TIMES = 20.0, 10.0
"""A test hangs after so many seconds, and so many times what it took without a change."""
SURE = 1.0
"""Seconds; who is killed by a test that fails later is tried once more, with that test alone: time may have run out."""
FIRST = 12
"""Tests that go first because they have killed mutants of the same function."""
MOST_STEPS = 300_000
"""Calls and returns of a test that are looked at for which functions it calls: long ones only do the same again."""
MOST_MEMORY = 6 << 30
"""Bytes of address space: some mutants would take all there is."""
UNFIT = 77
"""The exit code of a fork that cannot make the change."""
IMPORT = "<import>"
"""In place of a test: what runs before the first."""
PLAN = "SOAK_MUTANTS_PLAN"
"""The environment variable that names the plugin's plan."""


_RUNNING: set[subprocess.Popen[bytes]] = set()
"""The tests that are running now."""


class Mutant(NamedTuple):
    """One change."""

    function: str  # as tempo.py's reader would name it, such as Dispatcher.enqueue
    nth: int  # which of the lines of the function that read so; from 0
    before: str  # the line
    after: str
    operator: str
    source: str  # tempo.py with the change

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What names it, also when lines have moved."""
        return self.function, self.nth, self.before, self.after

    def show(self) -> str:
        """Return the change as a diff."""
        times = f", the {self.nth + 1}th such line" if self.nth else ""
        return f"{self.function}{times}  [{self.operator}]\n  - {self.before}\n  + {self.after}"


# -- The command -------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    from soak import environment  # noqa: PLC0415 - not in the plugin: it would import tempo too soon
    from soak.options import converter  # noqa: PLC0415
    from soak.units import parse_count  # noqa: PLC0415

    parser: argparse.ArgumentParser = commands.add_parser(
        "mutants",
        help="change tempo.py, one place at a time: does a test fail?",
        description="Mutation testing: change tempo.py in a copy of the tree, one place at a time, and run the tests.",
        epilog=f"exit code: 0 at least {TARGET:.0f} % are killed and every other one is listed with a reason, "
        "1 not so, 2 a bad option; example: python3 -m soak mutants --only enqueue --limit 50",
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    add(
        "--workers",
        type=converter(partial(parse_count, most=MOST)),
        metavar="N",
        default=environment.cores(),
        help="at a time (%(default)s)",
    )
    add(
        "--only",
        type=converter(_parse_pattern),
        metavar="REGEX",
        help="functions whose name has it, such as '_locked$'",
    )
    add(
        "--limit",
        type=converter(partial(parse_count, most=MOST)),
        metavar="N",
        help="a random sample of so many, the same each time",
    )
    add(
        "--stages",
        type=int,
        choices=range(1, len(SHARES) + 1),
        default=len(SHARES),
        help="how many stages of tests (%(default)s)",
    )
    add(
        "--resume", choices=("yes", "no"), default="yes", help="go on where a run of the same files ended (%(default)s)"
    )
    add("--json", type=Path, metavar="PATH", help="write all outcomes there too")


def _parse_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None


def main(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from soak.options import complain  # noqa: PLC0415

    for module in ("cosmic_ray", "pytest", "hypothesis"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            options.parser.error(
                f"{module} cannot be imported ({error}): pip install 'cosmic-ray>=8.3' pytest hypothesis"
            )
    listed = read_list(LISTED)
    every = list(mutants((ROOT / "tempo.py").read_text(encoding="utf-8")))
    chosen = [m for m in every if options.only is None or options.only.search(m.function)]
    if options.limit is not None and options.limit < len(chosen):
        picked = set(random.Random(1).sample(range(len(chosen)), options.limit))
        chosen = [m for i, m in enumerate(chosen) if i in picked]
    print(f"{len(every)} mutants, {len(chosen)} of them to try, {options.workers} at a time", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        try:
            trial = Trial(Path(folder), options, listed)
            outcomes = trial.run(chosen)
        except RuntimeError as error:
            complain(str(error))
            return 1
    unwritten = trial.unwritten
    if options.json is not None:
        try:
            options.json.write_text(json.dumps([as_json(m, outcomes[m.key]) for m in chosen], indent=1) + "\n")
        except OSError as error:
            complain(f"cannot write {str(options.json)!r}: {error.strerror}")
            unwritten = True
    lines, well = judge(chosen, outcomes, listed)
    if len(chosen) == len(every):
        lines += [f"listed, and no longer a mutant: {key}" for key in listed if key not in {m.key for m in every}]
    print("\n".join(lines))
    return 0 if well and not unwritten else 1


def judge(
    chosen: Sequence[Mutant], outcomes: dict[Any, dict[str, Any]], listed: dict[Any, str]
) -> tuple[list[str], bool]:
    """Return what to print, and whether all is well: enough are killed, and what survives is listed.

    The score is the usual one, killed over all but the equivalent mutants: those that are listed and survive.

    >>> mutant = Mutant("f", 0, "a < b", "a <= b", "ReplaceComparisonOperator_Lt_LtE", "")
    >>> judge([mutant], {mutant.key: {"outcome": "failed"}}, {})
    (['killed: 1 of 1 (100.0 %, 95 % needed): 1 a test failed, 0 hung'], True)
    >>> judge([mutant], {mutant.key: {"outcome": "survived"}}, {mutant.key: "why"})[0][1]
    'survived: 1, of which 1 listed as changing nothing'
    >>> judge([mutant], {mutant.key: {"outcome": "survived"}}, {})[1]
    False
    """
    by = Counter(outcomes[m.key]["outcome"] for m in chosen)
    survivors = [m for m in chosen if outcomes[m.key]["outcome"] == "survived"]
    new = [m for m in survivors if m.key not in listed]
    killed = by["failed"] + by["hung"]
    counted = len(chosen) - len(survivors) + len(new)
    score = 100 * killed / max(1, counted)
    lines = [
        f"killed: {killed} of {counted} ({score:.1f} %, {TARGET:.0f} % needed): "
        f"{by['failed']} a test failed, {by['hung']} hung"
    ]
    if survivors:
        lines.append(f"survived: {len(survivors)}, of which {len(survivors) - len(new)} listed as changing nothing")
    lines += [
        f"listed, but killed by {outcomes[m.key]['by']}:\n{m.show()}"
        for m in chosen
        if m.key in listed and m not in survivors
    ]
    lines += [f"SURVIVED: {m.show()}" for m in new]
    return lines, score >= TARGET and not new


def as_json(mutant: Mutant, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what is written of a mutant and what came of it."""
    return {**{k: v for k, v in mutant._asdict().items() if k != "source"}, **outcome}


def read_list(path: Path) -> dict[tuple[str, int, str, str], str]:
    """Return the mutants that are known to change nothing, and why."""
    if not path.exists():
        return {}
    groups = json.loads(path.read_text(encoding="utf-8"))
    return {
        (m["function"], m.get("nth", 0), m["before"], m["after"]): group["reason"]
        for group in groups
        for m in group["mutants"]
    }


# -- Mutants -----------------------------------------------------------------------------------------------------------


def mutants(source: str) -> Iterator[Mutant]:
    """Yield the changes of tempo.py's source, in its order, each once and all of them Python."""
    parso, tool = importlib.import_module("cosmic_ray.ast"), importlib.import_module("cosmic_ray.plugins")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    module = ast.parse(source)
    functions = _functions(module)
    spared = _spared(module, lines)
    found: list[tuple[tuple[int, int], Mutant]] = []
    nodes = list(parso.ast_nodes(parso.get_ast(source)))
    for name in OPERATORS:
        operator = tool.get_operator(f"core/{name}")()
        for node in nodes:
            for index, (start, _) in enumerate(operator.mutation_positions(node)):
                function = _function(functions, start[0])
                if function in CHECKERS or any(a <= start < b for a, b in spared):
                    continue
                if _needless(name, node, index):
                    continue
                row, column = node.get_start_pos_of_prefix()
                begin = starts[row - 1] + column
                end = begin + len(node.get_code())
                try:
                    changed = source[:begin] + _mutate(operator, node, index) + source[end:]
                    if name.startswith("ReplaceBinaryOperator_Mul"):  # the * of keyword-only arguments is none
                        ast.parse(changed)
                except (SyntaxError, AttributeError):  # the tool does not know `except queue.Empty`
                    continue
                here, there = next((a, b) for a, b in zip(lines, changed.splitlines(keepends=True)) if a != b)
                row = lines.index(here, start[0] - 1) + 1 if here in lines[start[0] - 1 :] else start[0]
                found.append((start, _named(lines, functions, row, function, here, there, name, changed)))
    seen = set()
    for _, mutant in sorted(found, key=lambda pair: pair[0]):
        if mutant.source not in seen:
            seen.add(mutant.source)
            yield mutant


def _needless(operator: str, node: Any, index: int) -> bool:
    """Return whether a change is like another one that is made: one less than a number other than 1, and a `not`
    before a condition that is one comparison, or begins with one."""
    if operator == "NumberReplacer":
        return index == 1 and node.value not in ("1", "1.0")
    if operator == "AddNot":
        condition = node.children[2 if node.type == "test" else 1]
        signs = [child.get_code().strip() for child in getattr(condition, "children", ())[1::2]]
        return condition.type == "not_test" or (
            condition.type == "comparison" and len(signs) == 1 and signs[0] in ("is", "is not", "==", "!=")
        )
    return False


def _mutate(operator: Any, node: Any, index: int) -> str:
    """Return the code of a node when the operator has changed it; the node itself stays as it is."""
    parent, node.parent = node.parent, None  # or the whole tree would be copied
    twin = copy.deepcopy(node)
    node.parent = twin.parent = parent
    code: str = operator.mutate(twin, index).get_code()
    return code


def _named(
    lines: Sequence[str],
    functions: Iterable[tuple[int, int, str]],
    row: int,
    function: str,
    here: str,
    there: str,
    operator: str,
    changed: str,
) -> Mutant:
    first = max((f for f in functions if f[0] <= row <= f[1]), default=(1, 0, ""))[0]
    nth = sum(line.strip() == here.strip() for line in lines[first - 1 : row - 1])
    return Mutant(function, nth, here.strip(), there.strip(), operator, changed)


def _functions(module: ast.Module) -> list[tuple[int, int, str]]:
    """Return first line, last line and name of each function and class."""
    found = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.append((first, child.end_lineno or child.lineno, name))
                walk(child, f"{name}.")
            else:
                walk(child, prefix)

    walk(module, "")
    return found


def _function(functions: Iterable[tuple[int, int, str]], row: int) -> str:
    return max((f for f in functions if f[0] <= row <= f[1]), default=(0, 0, "<module>"))[2]


def _spared(module: ast.Module, lines: Sequence[str]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the ranges (line, column) where nothing is changed: annotations, and what only type checkers read.

    Neither is ever run. Of a __repr__ the texts have nothing that an operator would change.
    """
    spared: list[ast.AST] = []
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            spared.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            spared.append(node.annotation)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            spared.append(node)

    def position(row: int, byte: int) -> tuple[int, int]:
        return row, len(lines[row - 1].encode()[:byte].decode())

    return [
        (position(n.lineno, n.col_offset), position(n.end_lineno, n.end_col_offset))  # type: ignore[attr-defined]
        for n in spared
    ]


# -- Trying them -------------------------------------------------------------------------------------------------------


class Trial:
    """One run of the command: the copies of the tree, the stages, and what was found out."""

    def __init__(self, folder: Path, options: argparse.Namespace, listed: dict[Any, str]) -> None:
        self.folder = folder
        self.workers: int = options.workers
        self.stages_wanted: int = options.stages
        self.listed = listed
        self.outcomes: dict[Any, dict[str, Any]] = {}
        self.durations: dict[str, float] = {}  # of each test, in the order of the file
        self.reach: dict[str, list[str] | None] = {}  # which functions it calls; None: it starts other processes
        self.stages: list[list[str]] = []
        self.killers: dict[str, Counter[str]] = {}  # by function
        self.ended = False  # by an interrupt
        self.unwritten = False  # the state: then an interrupted run begins anew
        self.lock = threading.Lock()  # guards outcomes, killers and the state
        self.digest = hashlib.sha256(
            b"".join((ROOT / name).read_bytes() for name in ("tempo.py", "test_tempo.py", "soak/mutants.py"))
        ).hexdigest()
        if options.resume == "yes" and STATE.exists():
            self._read_state()
        else:
            self._write_state(None)

    def _read_state(self) -> None:
        head, *rows = map(json.loads, STATE.read_text(encoding="utf-8").splitlines() or ["{}"])
        if head.get("digest") != self.digest:
            self._write_state(None)
            return
        self.durations, self.reach = head["durations"], head["reach"]
        for row in rows:
            key = (row["function"], row["nth"], row["before"], row["after"])
            self.outcomes[key] = row["result"]

    def _write_state(self, line: dict[str, Any] | None) -> None:
        """Append a line; None: begin the file anew. It goes on without the file when that cannot be written."""
        from soak.options import complain  # noqa: PLC0415 - the tests' process needs nothing of soak but this file

        if self.unwritten:
            return
        try:
            STATE.parent.mkdir(parents=True, exist_ok=True)
            with open(STATE, "w" if line is None else "a", encoding="utf-8") as file:
                file.write("" if line is None else json.dumps(line) + "\n")
        except OSError as error:
            self.unwritten = True
            complain(f"cannot write {str(STATE)!r}: {error.strerror}; an interrupted run will begin anew")

    def run(self, chosen: Sequence[Mutant]) -> dict[Any, dict[str, Any]]:
        """Try the mutants; return what came of each. Raises RuntimeError when tests fail without a change."""
        source = self._copy()
        if not self.durations:
            self._measure(source)
            self._write_state({"digest": self.digest, "durations": self.durations, "reach": self.reach})
        else:
            run_tests(source, list(self.durations)[:1], self.durations)  # so that the tests are compiled
        for cached in source.rglob("tempo.*.pyc"):  # never again one of a file that may have changed since
            cached.unlink()
        self.stages = split(self.durations)
        sizes = [f"{len(stage)} of {sum(map(self.durations.__getitem__, stage)):.0f} s" for stage in self.stages]
        print(f"tests: {', then '.join(sizes)}", flush=True)
        for mutant in chosen:
            if mutant.key in self.outcomes:
                self._learn(mutant, self.outcomes[mutant.key])
        todo = [m for m in chosen if not self._done(m)]
        copies = [source] + [
            Path(shutil.copytree(source, self.folder / str(i))) for i in range(1, min(self.workers, len(todo) or 1))
        ]
        free, begin, done = [Place(path, self.durations, self.stages[0]) for path in copies], time.monotonic(), 0

        def attempt(mutant: Mutant) -> None:
            nonlocal done
            with self.lock:
                place = free.pop()
            try:
                result = self._attempt(mutant, place)
            finally:
                with self.lock:
                    free.append(place)
            with self.lock:
                if self.ended:  # it did not come to a result
                    return
                self.outcomes[mutant.key] = result
                self._learn(mutant, result)
                self._write_state({**dict(zip(("function", "nth", "before", "after"), mutant.key)), "result": result})
                done += 1
                if result["outcome"] == "survived" and mutant.key not in self.listed:
                    print(f"survived: {mutant.show()}", flush=True)
                if done % 50 == 0 or done == len(todo):
                    print(f"{done} of {len(todo)} in {time.monotonic() - begin:.0f} s", flush=True)

        with ThreadPoolExecutor(len(copies)) as pool:
            try:
                for _ in pool.map(attempt, todo):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.ended = True
                raise
            finally:
                for process in list(_RUNNING):
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(5)
                    end(process)
        return self.outcomes

    def _copy(self) -> Path:
        """Copy the tree, with shorter waits in the tests."""
        place = self.folder / "0"
        unwanted = shutil.ignore_patterns(".*", "__pycache__", "out", "build", "dist", "*.egg-info", "htmlcov")
        shutil.copytree(ROOT, place, ignore=unwanted)
        checks = place / "soak" / "hostile" / "checks.py"
        text, n = re.subn(r"(?m)^LIMIT = [0-9.]+", f"LIMIT = {WAIT}", checks.read_text(encoding="utf-8"))
        if n != 1:
            raise RuntimeError(f"{checks.name} has no line LIMIT = ...")
        checks.write_text(text, encoding="utf-8")
        return place

    def _measure(self, place: Path) -> None:
        """Run the tests without a change, and note how long each takes."""
        print("the tests without a change ...", flush=True)
        report = run_tests(place, None, {})
        failed = report["failed"]
        for test in failed:  # once more, alone: on a busy machine time may have run out
            if run_tests(place, [test], {})["code"]:
                raise RuntimeError(f"without a change, {test} fails, waiting {WAIT:.0f} s at most")
            print(f"left out, because it failed and then passed without a change: {test}", flush=True)
        if report["code"] and not failed:
            raise RuntimeError(f"the tests cannot be run: {report['text'][-2000:]}")
        self.durations = {test: seconds for test, seconds in report["durations"].items() if test not in failed}
        functions = _functions(ast.parse((place / "tempo.py").read_text(encoding="utf-8")))
        for test, lines in run_tests(place, list(self.durations), self.durations, calls=True)["calls"].items():
            self.reach[test] = None if lines is None else sorted({_function(functions, line) for line in lines})

    def _done(self, mutant: Mutant) -> bool:
        known = self.outcomes.get(mutant.key)
        return known is not None and (known["outcome"] != "survived" or known["stages"] >= self._wanted(mutant))

    def _wanted(self, mutant: Mutant) -> int:
        """How many stages to try; of what is listed the first only, for that it changes nothing is known."""
        return 1 if mutant.key in self.listed else self.stages_wanted

    def _tests(self, mutant: Mutant, stage: int) -> list[str]:
        """Return the tests of a stage that may notice: of a change outside of functions all do."""
        known = {function for reach in self.reach.values() for function in reach or ()}
        if mutant.function not in known or mutant.function in (self.reach.get(IMPORT) or ()):
            return self.stages[stage]

        def may(test: str) -> bool:
            reach = self.reach.get(test)
            return reach is None or mutant.function in reach

        return sorted(filter(may, self.stages[stage]), key=self.durations.__getitem__)

    def _learn(self, mutant: Mutant, result: dict[str, Any]) -> None:
        if result["by"] in self.durations:
            self.killers.setdefault(mutant.function, Counter())[result["by"]] += 1

    def _attempt(self, mutant: Mutant, place: Place) -> dict[str, Any]:
        """Try one mutant in one copy."""
        begin = time.monotonic()
        known = self.outcomes.get(mutant.key, {"stages": 0})
        # What has run before the first test cannot be changed any more.
        quick = mutant.function not in (self.reach.get(IMPORT) or ())
        place.take(mutant, quick)
        tried: set[str] = set()
        for stage in range(known["stages"], self._wanted(mutant)):
            with self.lock:
                first = [test for test, _ in self.killers.get(mutant.function, Counter()).most_common(FIRST)]
            tests = [t for t in [*first, *(t for t in self._tests(mutant, stage) if t not in first)] if t not in tried]
            while tests and not self.ended:
                report = place.run(tests)
                if not report["code"]:
                    break
                by = report["at"]
                sure = report["failed"] and report["seconds"] <= SURE
                again = None if sure or by not in self.durations else place.run([by])
                if again is None or again["code"]:
                    hung = not (again or report)["failed"] and by in self.durations
                    seconds = round(time.monotonic() - begin, 1)
                    return {"outcome": "hung" if hung else "failed", "by": by, "stages": stage + 1, "seconds": seconds}
                tests = tests[tests.index(by) + 1 :]  # it was the time, perhaps: go on behind it
            tried.update(first, self.stages[stage])
        seconds = round(time.monotonic() - begin, 1)
        return {"outcome": "survived", "by": None, "stages": self._wanted(mutant), "seconds": seconds}


class Place:
    """A copy of the tree, in which one mutant at a time is tried.

    A process that has imported tempo.py and collected the tests waits there; for each run it forks, and the child puts
    the changed code into its function. A change elsewhere takes a process that begins from the start.
    """

    def __init__(self, path: Path, durations: dict[str, float], trusted: list[str]) -> None:
        self.path = path
        self.trusted = trusted  # tests that pass without a change, to see whether they do in a fork
        self.durations = durations
        self.original = (path / "tempo.py").read_text(encoding="utf-8")
        self.function: str | None = None  # which is changed, if a fork can do that
        self.server: subprocess.Popen[bytes] | None = None
        self.orders: Any = None
        self.answers: Any = None

    def take(self, mutant: Mutant, quick: bool) -> None:
        """Change tempo.py, here."""
        self.function = mutant.function if quick and hasattr(os, "fork") else None
        if self.function is not None and (self.server is None or self.server.poll() is not None):
            (self.path / "tempo.py").write_text(self.original, encoding="utf-8")
            self._serve()
        (self.path / "tempo.py").write_text(mutant.source, encoding="utf-8")

    def run(self, tests: list[str]) -> dict[str, Any]:
        """Run tests until one fails; return what run_tests does."""
        if self.function is not None:
            report = self._ask(tests, self.function)
            if report["code"] not in (None, UNFIT):
                return report
            self.function = None
        return run_tests(self.path, tests, self.durations)

    def _ask(self, tests: list[str], function: str | None) -> dict[str, Any]:
        """Have tests run in a fork; the code is None when the process has ended."""
        report = self.path / "report.json"
        report.unlink(missing_ok=True)
        order = {"tests": tests, "limits": limits(tests, self.durations), "function": function}
        try:
            self.orders.write(json.dumps(order).encode() + b"\n")
            answer = self.answers.readline()
        except OSError:
            answer = b""
        return {**read_report(report), "code": int(answer) if answer else None}

    def _serve(self) -> None:
        orders, self_orders = os.pipe()
        self_answers, answers = os.pipe()
        plan: dict[str, Any] = {"tests": None, "limits": {}, "calls": False, "serve": [orders, answers]}
        self.server = _start(self.path, {**plan, "report": str(self.path / "report.json")}, ["-x"], (orders, answers))
        os.close(orders)
        os.close(answers)
        self.orders = os.fdopen(self_orders, "wb", buffering=0)
        self.answers = os.fdopen(self_answers, "rb")
        if not self.answers.readline():  # it has imported tempo.py: only now may that change
            raise RuntimeError(f"the tests cannot be served: see {self.path / 'output.txt'}")
        for _ in range(3):  # on a busy machine time may run out
            report = self._ask(self.trusted, None)
            if not report["code"]:
                return
        raise RuntimeError(f"without a change, {report['at']} fails in a fork")


def split(durations: dict[str, float]) -> list[list[str]]:
    """Return the tests of each stage, in the order of the file in the first, from the shortest on in the others.

    >>> split({"a": 5.0, "b": 0.02, "c": 4.0, "d": 0.01, "e": 0.6})
    [['b', 'd'], ['e'], ['c'], ['a']]
    """
    total, sofar = sum(durations.values()), 0.0
    stages: list[list[str]] = [[] for _ in SHARES]
    for test in sorted(durations, key=durations.__getitem__):
        sofar += durations[test]
        stages[next(i for i, share in enumerate(SHARES) if sofar <= share * total * 1.000001)].append(test)
    order = {test: i for i, test in enumerate(durations)}
    stages[0].sort(key=order.__getitem__)
    return stages


def run_tests(
    place: Path, tests: list[str] | None, durations: dict[str, float], *, calls: bool = False
) -> dict[str, Any]:
    """Run tests in a copy until one fails (None: all of them, to the end); return what the plugin reports.

    The report: code; at: the test that failed, or in which it ended; seconds: how long that took; failed: all that
    failed; durations of all; calls: in which lines of tempo.py what each called begins. That is found out when `calls`
    is true, and then a failure does not end it. Whatever the tests leave running is ended.
    """
    report = place / "report.json"
    report.unlink(missing_ok=True)
    plan = {"tests": tests, "limits": limits(tests or (), durations), "calls": calls, "serve": None}
    process = _start(place, {**plan, "report": str(report)}, [] if tests is None or calls else ["-x"])
    try:
        # The plugin ends what hangs: this is for what hangs beside it.
        process.wait(None if tests is None else 120 + sum(limits(tests, durations).values()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        end(process)
    text = (place / "output.txt").read_text(encoding="utf-8", errors="replace")[-10000:]
    return {**read_report(report), "code": process.returncode, "text": text}


def limits(tests: Iterable[str], durations: dict[str, float]) -> dict[str, float]:
    """Return after how many seconds each test is taken to hang."""
    return {test: HANG + HANG_TIMES * durations.get(test, 10.0) for test in tests}


def _start(place: Path, plan: dict[str, Any], options: list[str], fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """Start pytest in a copy."""
    (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-X", "utf8", "-m", "pytest", "-q", "-p", "soak.mutants", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=0", "--tb=short", f"--basetemp={place / 'scratch'}", "test_tempo.py"]
    variables = {**os.environ, PLAN: str(place / "plan.json"), "PYTHONHASHSEED": "0"}
    # The tests are compiled once, by a run without a change. Of tempo.py no compiled file is ever written then: one
    # that is as old as the next change, to the second, would be run in its place.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    if list(place.glob("__pycache__/test_tempo.*")):
        variables["PYTHONDONTWRITEBYTECODE"] = "1"
    with open(place / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [*command, *options],
            cwd=place,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=fds,
        )
    _RUNNING.add(process)
    return process


def read_report(path: Path) -> dict[str, Any]:
    """Return what the plugin has written of a run."""
    found: dict[str, Any] = {"at": IMPORT, "seconds": 0.0, "failed": [], "durations": {}, "calls": {}, "text": ""}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "lines" in row:
                found["calls"][row["test"]] = row["lines"]
                continue
            if "seconds" not in row:
                found["at"] = row["test"]
                continue
            found["durations"][row["test"]] = found["durations"].get(row["test"], 0.0) + row["seconds"]
            if row["failed"] and row["test"] not in found["failed"]:
                found["failed"].append(row["test"])
                found["seconds"] = row["seconds"]
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _RUNNING.discard(process)


# -- The plugin --------------------------------------------------------------------------------------------------------


class Plugin:
    """What a run of the tests does besides."""

    def __init__(self) -> None:
        self.plan = json.loads(Path(os.environ[PLAN]).read_text(encoding="utf-8"))
        self.report = self._open()
        self.lines: set[int] = set()
        self.outside = False  # it has started a process, whose calls are not seen here
        self.steps = 0
        self.begun = False
        self.file = str(Path("tempo.py").resolve())
        if self.plan["calls"]:
            sys.addaudithook(self._audit)
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)

    def _open(self) -> Any:
        return open(self.plan["report"], "w", encoding="utf-8", buffering=1)

    def _audit(self, event: str, _: Any) -> None:
        if event in ("os.fork", "subprocess.Popen"):
            self.outside = True

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            sys.setprofile(None)
        if event == "call" and frame.f_code.co_filename == self.file:
            self.lines.add(frame.f_code.co_firstlineno)

    def write(self, **line: Any) -> None:
        self.report.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Take the planned tests, in the order of the plan."""
        found = {item.nodeid: item for item in items}
        if self.plan["tests"] is None:
            items[:] = [item for item in items if not LEFT_OUT.search(item.name)]
        else:
            items[:] = [found[test] for test in self.plan["tests"] if test in found]

    def pytest_runtestloop(self, session: Any) -> bool | None:
        """When a Place asks for it, run the tests of each order in a fork."""
        if not self.plan["serve"]:
            return None
        faulthandler.cancel_dump_traceback_later()
        found = {item.nodeid: item for item in session.items}
        orders, answers = (os.fdopen(fd, mode, buffering=0) for fd, mode in zip(self.plan["serve"], ("rb", "wb")))
        child = 0

        def leave(*_: Any) -> None:
            if child:
                os.killpg(child, signal.SIGKILL)
            os._exit(0)

        signal.signal(signal.SIGTERM, leave)
        answers.write(b"0\n")
        for line in orders:
            order = json.loads(line)
            child = os.fork()
            if not child:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                orders.close()
                answers.close()
                os.setsid()
                self.plan.update(order)
                self.report.close()
                self.report = self._open()
                if order["function"] is not None and not change(
                    order["function"], Path(self.file).read_text(encoding="utf-8")
                ):
                    os._exit(UNFIT)
                session.items[:] = [found[test] for test in order["tests"] if test in found]
                return None  # and go on as a run of these
            _, status = os.waitpid(child, 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            child = 0
            answers.write(b"%d\n" % (status >> 8 or status))
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test is running, and see that it ends."""
        self.write(test=nodeid)
        faulthandler.dump_traceback_later(self.plan["limits"].get(nodeid, 300), exit=True, file=2)
        if self.plan["calls"]:
            if not self.begun:
                self.write(test=IMPORT, lines=sorted(self.lines))
                self.lines.clear()
                self.begun = True
            self.steps = 0
            sys.setprofile(self._profile)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how long a part of a test took, and whether it failed."""
        self.write(test=report.nodeid, seconds=round(report.duration, 4), failed=report.failed)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note what it called."""
        if self.plan["calls"]:
            self.write(test=nodeid, lines=None if self.outside else sorted(self.lines))
            self.lines.clear()
            self.outside = False

    def pytest_sessionfinish(self) -> None:
        """See that the interpreter ends."""
        faulthandler.dump_traceback_later(30, exit=True, file=2)


def change(function: str, source: str) -> bool:
    """Give a function of the imported tempo the code that it has in a source; return whether that differs."""
    module: Any = sys.modules["tempo"]
    code, found = compile(source, module.__file__, "exec"), module
    for name in function.split("."):
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType) and const.co_name == name]
        found = vars(found).get(name)
        if not inner or found is None:
            return False
        code = inner[-1]  # those before are overloads
    if isinstance(found, property):
        found = found.fget
    before = getattr(found, "__code__", code)
    if before == code:
        return False
    found.__code__ = code
    for name, value in list(vars(module).items()):  # tempo knows its frames by their code
        if value is before:
            setattr(module, name, code)
    return True


def pytest_configure(config: Any) -> None:
    """Begin: random examples are the same each time, and memory and time end."""
    hypothesis = importlib.import_module("hypothesis")
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    if HAS_RESOURCE:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    faulthandler.dump_traceback_later(60, exit=True, file=2)
    config.pluginmanager.register(Plugin())
