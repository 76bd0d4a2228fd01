"""Runs the tests named for each mutant, which must fail with it and pass without any.

    python -m tests.mutants              all of them; without a GPU, those that need none
    python -m tests.mutants WORD ...     those whose fault or file has one of the words
    python -m tests.mutants --workers N  so many test processes side by side

Exits with 1 if a mutant survives, cannot be compiled, or is stale: then its text is not there.
Interrupted, it says what was judged until then.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import enum
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from mutants import apply
from mutants.apply import VARIABLE
from mutants.catalogue import MUTANTS
from mutants.mutant import ROOT, TESTS, Mutant
from support import device, receipt

TIMEOUT = 400  # seconds
NO_PROGRAM = "cannot compile", "NVRTCError", "SyntaxError", "OutOfMemoryError"


class Verdict(enum.Enum):
    KILLED = "killed"
    SURVIVED = "SURVIVED"
    INVALID = "INVALID"  # no fault of a program, but no program
    UNKNOWN = "UNKNOWN"  # a kernel that never ends, or a machine that is too busy


class Result(NamedTuple):
    verdict: Verdict
    why: str


def run_tests(tests: str, mutant: Mutant | None = None) -> Result:
    """What tests say of a mutant; of the tree as it is, for None."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"CUPY_PAGED_RECEIPT": os.devnull}
    if mutant is not None:
        command += ["-p", apply.__name__]
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {VARIABLE: json.dumps(mutant), "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Result(Verdict.UNKNOWN, f"still running after {TIMEOUT} s")
    if done.returncode == -signal.SIGTERM:
        return Result(Verdict.UNKNOWN, "was terminated")
    if done.returncode == 0:
        return Result(Verdict.SURVIVED, done.stdout.strip()[-300:])
    # A line without "::" is of a file that could not even be collected.
    failed = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR")) and "::" in line
    ]
    is_invalid = not failed or any(word in done.stdout for word in NO_PROGRAM)
    why = failed[0] if failed else (done.stdout + done.stderr).strip()[-300:]
    return Result(Verdict.INVALID if is_invalid else Verdict.KILLED, why)


def judge(mutant: Mutant) -> Result:
    """Runs a mutant's tests, and prints what came of it."""
    start = time.perf_counter()
    try:
        mutant.text()
        result = run_tests(mutant.tests, mutant)
    except ValueError as stale:
        result = Result(Verdict.INVALID, str(stale))
    seconds = time.perf_counter() - start
    print(f"{result.verdict.value:8}  {mutant.fault}, {seconds:.0f} s: {result.why}", flush=True)
    return result


def first_failure(runs: dict[str, concurrent.futures.Future[Result]]) -> str | None:
    """What is wrong with the first tests that fail with nothing changed. None if all pass."""
    tests = {run: tests for tests, run in runs.items()}
    for run in concurrent.futures.as_completed(tests):
        if run.result().verdict is not Verdict.SURVIVED:
            return f"{tests[run]} fails without any mutant: {run.result().why}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 1) // 3))
    options = parser.parse_args(arguments)

    chosen = [
        mutant
        for mutant in MUTANTS
        if not options.words or any(w in mutant.fault or w in mutant.file for w in options.words)
    ]
    if not chosen:
        parser.error(f"no fault and no file has {' or '.join(options.words)} in it")
    if reason := device.missing():
        left_out = sum(mutant.needs_gpu for mutant in chosen)
        chosen = [mutant for mutant in chosen if not mutant.needs_gpu]
        print(f"{left_out} mutants need a GPU, left out: {reason}")
    with concurrent.futures.ThreadPoolExecutor(options.workers) as workers:
        # A machine on which they fail anyway would kill all mutants, whatever a receipt says.
        tests = dict.fromkeys(mutant.tests for mutant in chosen)
        unchanged = {name: workers.submit(run_tests, name) for name in tests}
        judged = [workers.submit(judge, mutant) for mutant in chosen]
        try:
            if broken := first_failure(unchanged):
                print(broken, flush=True)
                workers.shutdown(cancel_futures=True)
                return 1
            concurrent.futures.wait(judged)
        except KeyboardInterrupt:
            workers.shutdown(wait=False, cancel_futures=True)
            print("interrupted: what was judged until then")
            _report(chosen, judged)
            os._exit(1)  # without those that still run
    return int(_report(chosen, judged) < len(chosen))


def _report(chosen: list[Mutant], judged: list[concurrent.futures.Future[Result]]) -> int:
    """Prints what came of those that are judged; returns how many were killed."""
    done = [one.done() and not one.cancelled() for one in judged]
    verdicts = {
        mutant.fault: one.result().verdict.value
        for mutant, one in itertools.compress(zip(chosen, judged, strict=True), done)
    }
    killed = list(verdicts.values()).count(Verdict.KILLED.value)
    print(f"{killed} of {len(chosen)} mutants killed")
    texts = {mutant.fault: mutant.digest() for mutant in chosen if mutant.fault in verdicts}
    log = {"mutants": verdicts, "texts": texts, **receipt.stamp("mutants", device.name())}
    print(json.dumps(log), flush=True)
    return killed
