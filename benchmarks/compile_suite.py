"""The first call of one specialisation: compiled anew, and from the disk cache in a new process.

What is timed is the call alone, without Python's start, imports and the CUDA context.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.results import WRONG_RESULT, Measurement
from benchmarks.runner import Runner
from benchmarks.timing import summarise

CACHES, LOADS = 2, 3  # times that a kernel is compiled, and that each of them is loaded again
FirstCall = Callable[[str, str, Path], float]
KERNELS = (("HND", "bf16"), ("NHD", "bf16"), ("vllm", "bf16"), ("HND", "fp8"))


def first_call(layout: str, dtypes: str, cache: Path) -> float:
    """Seconds, measured by a new process. Raises RuntimeError with the last line of its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_call", layout, dtypes],
        cwd=ROOT,
        env={**os.environ, "CUPY_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1])
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def files_in(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


class Kernel:
    """One specialisation: its calls are made when the first of its two times is asked for."""

    def __init__(self, layout: str, dtypes: str, call: FirstCall) -> None:
        self.layout, self.dtypes, self._call = layout, dtypes, call
        self._cold: list[float] = []
        self._from_disk: list[float] = []
        self._files_added = 0

    def _run(self) -> None:
        for _ in range(CACHES):
            with tempfile.TemporaryDirectory() as folder:
                cache = Path(folder)
                self._cold.append(self._call(self.layout, self.dtypes, cache))
                files = files_in(cache)
                for _ in range(LOADS):
                    self._from_disk.append(self._call(self.layout, self.dtypes, cache))
                self._files_added += files_in(cache) - files

    def cold(self, blank: Measurement) -> Measurement:
        if not self._cold:
            self._run()
        return blank.timed(summarise([1e6 * seconds for seconds in self._cold]))

    def from_disk(self, blank: Measurement) -> Measurement:
        if not self._from_disk:
            self._run()
        if self._files_added:
            return blank.without_time(WRONG_RESULT, "the second process compiled again")
        return blank.timed(summarise([1e6 * seconds for seconds in self._from_disk]))


def run(
    runner: Runner,
    kernels: tuple[tuple[str, str], ...] = KERNELS,
    call: FirstCall = first_call,
) -> None:
    for layout, dtypes in kernels:
        kernel = Kernel(layout, dtypes, call)
        for op, action in (("cold", kernel.cold), ("from disk", kernel.from_disk)):
            blank = Measurement(
                suite="compile",
                shape="first call",
                system="ours",
                op=op,
                dtypes=dtypes,
                layout=layout,
                arrays="cupy",
                problem="1x1, 32/8, 128",
            )
            runner.measure(blank, action)
