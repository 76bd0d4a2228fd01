"""Runs random cases against the oracle.

    python -m tests.fuzz                                     1,000 cases, on a GPU if there is one
    python -m tests.fuzz --cases 10000 --device gpu --workers 8
    python -m tests.fuzz --seed S --case N                   one of them again

Prints a line for each failure that runs it again, and a line of JSON at the end. Exits with 1 where
a case failed or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fuzz import attention, moves, space
from support import device, frameworks, receipt
from support.data import Case

PROGRESS = 10  # seconds between two lines of it
LOST = "CUDARuntimeError", "CUDADriverError", "AcceleratorError", "JaxRuntimeError"
"""Errors after which a process may have lost its device, and with it all cases that follow."""


class CaseError(Exception):
    """A case went wrong, by the error that caused this one."""

    def __init__(self, what: str, cause: Exception) -> None:
        message = " ".join(str(cause).split())[:500]
        super().__init__(what, f"{type(cause).__name__}: {message}")
        self.what, self.error = self.args
        self.is_device_lost = type(cause).__name__ in LOST


class Failure(NamedTuple):
    """A case that went wrong."""

    seed: int
    case: int
    what: str
    error: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --seed {self.seed} --case {self.case}"
        return f"FAILED  {again}  # {self.what}: {self.error}"


def adapters(on: str) -> list[Any]:
    """The frameworks whose arrays a case may be given."""
    return frameworks.device() if on == "gpu" else frameworks.host()


def run_case(seed: int, case: int, on: str) -> str:
    """Runs one case; returns what it is. Raises CaseError."""
    chosen, rng = space.of_case(seed, case)
    template = chosen.template
    present = adapters(on)
    if chosen.kind != "attention":
        present = frameworks.writable(present)
    elif template.strides != "contiguous":
        # JAX has no strides, so that its arrays would be another specialisation.
        present = [arrays for arrays in present if arrays.name != "jax"]
    arrays = present[rng.integers(len(present))]
    what = f"{chosen.kind} of {arrays.name}, {template}"
    try:
        if chosen.kind == "attention":
            problem = attention.draw(template, rng)
            what += f", lengths {problem.seq_lens.tolist()}, max_seq_len {problem.max_seq_len}"
            attention.check(problem, arrays, rng, scratch_of(template))
        else:
            moves.CHECKS[chosen.kind](template, arrays, rng)
    except Exception as error:
        raise CaseError(what, error) from error
    return what


def scratch_of(template: Case) -> str:
    """The dtype of a caller's scratch: one for all cases of a specialisation."""
    return template.dtype if template.group % 3 == 0 else "float32"


def run_cases(seed: int, cases: Iterable[int], on: str) -> Iterator[Failure | None]:
    """Runs cases; yields None for each that passed. Ends early where the device is lost."""
    for case in cases:
        try:
            run_case(seed, case, on)
        except CaseError as error:
            yield Failure(seed, case, error.what, error.error)
            if error.is_device_lost:
                return
        else:
            yield None


class Tally:
    """What has come of a run so far, and a line about it now and then."""

    def __init__(self, cases: int) -> None:
        self.cases, self.done = cases, 0
        self.failures: list[Failure] = []
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, failure: Failure | None) -> None:
        with self._lock:
            self.done += 1
            if failure is not None:
                self.failures.append(failure)
                print(failure, flush=True)
            if time.monotonic() - self._last > PROGRESS:
                self._last = time.monotonic()
                words = f"{self.done} of {self.cases} cases, {len(self.failures)} failures"
                print(f"{words}, {self.seconds:.0f} s", flush=True)


def run_worker(tally: Tally, options: argparse.Namespace, number: int) -> None:
    """Has another process run its share of the cases, and adds up what it says."""
    command = [
        sys.executable, "-m", "tests.fuzz", "--seed", options.seed, "--cases", options.cases,
        "--device", options.device, "--workers", options.workers, "--worker", number,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, command)),
        cwd=receipt.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            said = json.loads(line)
            tally.add(None if said is None else Failure(*said))


def share(options: argparse.Namespace, number: int) -> list[int]:
    """The cases of one worker: all those of its specialisations, one after the other."""
    return [
        case
        for first in range(number, space.NUM_SPECIALISATIONS, options.workers)
        for case in range(first, options.cases, space.NUM_SPECIALISATIONS)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--case", type=int, help="run this one alone, and let its error through")
    parser.add_argument("--device", choices=["host", "gpu"])
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or ("host" if device.missing() else "gpu")
    if options.device == "gpu" and (why := device.missing()):
        print(f"No GPU to run on: {why}. --device host runs the NumPy reference")
        return 2

    if options.case is not None:
        print(run_case(options.seed, options.case, options.device))
        return 0
    if options.worker is not None:
        for failure in run_cases(options.seed, share(options, options.worker), options.device):
            print(json.dumps(failure), flush=True)
        return 0

    tally = Tally(options.cases)
    if options.workers == 1:
        for failure in run_cases(options.seed, range(options.cases), options.device):
            tally.add(failure)
    else:
        workers = [
            threading.Thread(target=run_worker, args=(tally, options, number))
            for number in range(options.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    log = {
        "fuzz": options.device,
        "seed": options.seed,
        "cases": options.cases,
        "not_run": options.cases - tally.done,
        "failures": [failure._asdict() for failure in tally.failures],
        "specialisations": min(options.cases, space.NUM_SPECIALISATIONS),
        "seconds": round(tally.seconds, 1),
        **receipt.stamp("CPU" if options.device == "host" else device.name()),
    }
    print(json.dumps(log))
    return int(bool(tally.failures) or tally.done < options.cases)
