"""Runs random cases against the oracle.

    python -m tests.fuzz                                     1,000 cases, on a GPU if there is one
    python -m tests.fuzz --seeds 10 --cases 1500 --device gpu --workers 8     of each of ten seeds
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
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fuzz import attention, moves, space
from support import device, frameworks, receipt
from support.data import Case

PROGRESS = 10  # seconds between two lines of it
FRAMEWORKS = "cupy", "jax", "numpy", "torch"
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


def arrays_of_case(seed: int, case: int, on: str) -> Any:
    """The framework of a case, which draws nothing that the rest of the case depends on.

    It is the first one in a random order that is there: where another one is missing, a case has
    the same framework still.
    """
    chosen = space.of_case(seed, case)[0]
    present = adapters(on)
    if chosen.kind != "attention":
        present = frameworks.writable(present)
    elif chosen.template.strides != "contiguous":
        # JAX has no strides, so that its arrays would be another specialisation.
        present = [arrays for arrays in present if arrays.name != "jax"]
    order = np.random.default_rng([seed, case, 1]).permutation(FRAMEWORKS).tolist()
    return min(present, key=lambda arrays: order.index(arrays.name))


def run_case(seed: int, case: int, on: str) -> str:
    """Runs one case; returns what it is. Raises CaseError."""
    chosen, rng = space.of_case(seed, case)
    template = chosen.template
    arrays = arrays_of_case(seed, case, on)
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


def run_cases(cases: Iterable[tuple[int, int]], on: str) -> Iterator[tuple[int, Failure | None]]:
    """Runs cases, each by its seed and number; yields its seed, and None for one that passed.

    Ends early where the device is lost.
    """
    for seed, case in cases:
        try:
            run_case(seed, case, on)
        except CaseError as error:
            yield seed, Failure(seed, case, error.what, error.error)
            if error.is_device_lost:
                return
        else:
            yield seed, None


class Tally:
    """What has come of a run so far, and a line about it now and then."""

    def __init__(self, cases: int) -> None:
        self.cases = cases
        self.done: Counter[int] = Counter()  # by seed
        self.failures: list[Failure] = []
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, seed: int, failure: Failure | None) -> None:
        with self._lock:
            self.done[seed] += 1
            if failure is not None:
                self.failures.append(failure)
                print(failure, flush=True)
            if time.monotonic() - self._last > PROGRESS:
                self._last = time.monotonic()
                words = f"{self.done.total()} of {self.cases} cases, {len(self.failures)} failures"
                print(f"{words}, {self.seconds:.0f} s", flush=True)


def run_worker(tally: Tally, options: argparse.Namespace, number: int) -> None:
    """Has another process run its share of the cases, and adds up what it says."""
    command = [
        sys.executable, "-m", "tests.fuzz", "--seed", options.seed, "--seeds", options.seeds,
        "--cases", options.cases, "--device", options.device, "--workers", options.workers,
        "--worker", number,
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
            seed, failure = json.loads(line)
            tally.add(seed, failure and Failure(*failure))


def share(options: argparse.Namespace, number: int = 0) -> list[tuple[int, int]]:
    """The cases of one worker: all those of its specialisations, one after the other."""
    first = range(number, options.seeds * space.NUM_SPECIALISATIONS, options.workers)
    chosen = (divmod(one, space.NUM_SPECIALISATIONS) for one in first)
    return [
        (options.seed + seed, case)
        for seed, specialisation in chosen
        for case in range(specialisation, options.cases, space.NUM_SPECIALISATIONS)
    ]


def drawn(seed: int, cases: int, on: str) -> dict[str, Any]:
    """What so many cases of a seed are: for the log."""
    chosen = [space.of_case(seed, case)[0] for case in range(min(cases, space.NUM_SPECIALISATIONS))]
    attended = [one.template for one in chosen if one.kind == "attention"]
    return {
        "specialisations": len(chosen),
        "head_sizes": sorted({template.head_size for template in attended}),
        "block_sizes": sorted({template.block_size for template in attended}),
        "frameworks": Counter(arrays_of_case(seed, case, on).name for case in range(cases)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many, from that one on")
    parser.add_argument("--cases", type=int, default=1000, help="of each seed")
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
        for said in run_cases(share(options, options.worker), options.device):
            print(json.dumps(said), flush=True)
        return 0

    tally = Tally(options.seeds * options.cases)
    if options.workers == 1:
        for seed, failure in run_cases(share(options), options.device):
            tally.add(seed, failure)
    else:
        workers = [
            threading.Thread(target=run_worker, args=(tally, options, number))
            for number in range(options.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    failed: dict[int, list[dict[str, Any]]] = {}
    for failure in tally.failures:
        failed.setdefault(failure.seed, []).append(failure._asdict())
    log = {
        "fuzz": options.device,
        "seeds": {
            seed: {
                "cases": tally.done[seed],
                "failures": failed.get(seed, []),
                **drawn(seed, options.cases, options.device),
            }
            for seed in range(options.seed, options.seed + options.seeds)
        },
        "not_run": tally.cases - tally.done.total(),
        "seconds": round(tally.seconds, 1),
        **receipt.stamp("fuzz", "CPU" if options.device == "host" else device.name()),
    }
    print(json.dumps(log))
    return int(bool(tally.failures) or tally.done.total() < tally.cases)
