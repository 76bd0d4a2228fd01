"""What a mutant is."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GPU_TESTS = "tests/gpu/"


class Mutant(NamedTuple):
    """One fault.

    fault    what is wrong, in words; no two mutants share it
    file     the source, from the root of the repository
    old      text that occurs in it exactly once
    new      what stands there instead
    tests    of which at least one must fail: a path, or a test's id
    """

    fault: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def needs_gpu(self) -> bool:
        return self.tests.startswith(GPU_TESTS)

    def digest(self) -> str:
        """Tells it from a mutant that had the same words for another fault."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    def text(self) -> str:
        """The changed source; raises ValueError where `old` is not there exactly once."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.fault}: {self.file} has {count} times, not once: {self.old!r}")
        return source.replace(self.old, self.new)
