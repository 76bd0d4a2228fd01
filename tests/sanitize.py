"""Runs a reduced grid of the GPU tests under compute-sanitizer: `python tests/sanitize.py [TOOL]`.

TOOL is memcheck (the default), initcheck, racecheck or synccheck. `--workers N` runs N sanitizers
side by side, each with a share of the tests: racecheck takes a quarter of an hour with one. (One
sanitizer that watches the workers of pytest-xdist needs minutes until eight of them have begun.)

Memory pools are switched off: an access past the end of one array would otherwise land in the
pool's own memory and pass. For racecheck every lane waits and signals for itself: the tool takes
what one does for its warp, behind a __syncwarp, for a race. Before all that the tool has to find a
fault that was planted for it. Exits with the sanitizer's status, which is not 0 if it found
anything else or a test failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import share as share_of_tests
from support import device, receipt

TOOLS = "memcheck", "initcheck", "racecheck", "synccheck"
SANITIZER = "compute-sanitizer"
PLANTED = "tests/planted_faults.py::test_a_fault"
TESTS = Path(__file__).resolve().parent
SHARED_MEMORY = (  # of kernels that use it, which is what racecheck looks at
    "tests/gpu/test_attention.py::test_matches_oracle",
    "tests/gpu/test_attention.py::test_matches_oracle_on_few_thread_blocks",
    "tests/gpu/test_attention.py::test_matches_oracle_on_the_paths_of_older_chips",
    "tests/gpu/test_attention.py::test_matches_oracle_on_the_paths_of_an_ampere",
    "tests/gpu/test_attention.py::test_matches_oracle_with_little_shared_memory",
    "tests/gpu/test_block_ops.py::TestGather",
    "tests/gpu/test_block_ops.py::TestLayout",
)
GRID = (
    *SHARED_MEMORY,
    "tests/gpu/test_merge.py::TestMerge",
    "tests/gpu/test_cache_ops.py::TestCacheOps::test_shapes",
    "tests/gpu/test_cache_ops.py::TestConvert",
    "tests/gpu/test_block_ops.py::TestCopyBlocks",
    "tests/gpu/test_block_ops.py::TestSwapBlocks",
    "tests/gpu/test_block_ops.py::TestMla",
)
ARRAYS = "not torch"  # kernels see the same of all frameworks

SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards? displayed)")
PASSED = re.compile(r"\b(\d+) passed\b.* in [\d.]+s")
NOT_PASSED = re.compile(r"\b[1-9]\d* (?:failed|errors?|skipped|xfailed|xpassed)\b.* in [\d.]+s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/sanitize.py")
    parser.add_argument("tool", nargs="?", default=TOOLS[0], choices=TOOLS)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="sanitizers, each with a share of the tests",
    )
    options = parser.parse_args()
    tool = options.tool
    if shutil.which(SANITIZER) is None:
        print(f"{SANITIZER} is not on the PATH; it comes with the CUDA toolkit")
        return 2
    if not run(tool, [f"{PLANTED}[{tool}]"]).found:
        print(f"{tool} has not found the fault that was planted for it")
        return 1
    tests = ["-x", "-k", ARRAYS, *(SHARED_MEMORY if tool == "racecheck" else GRID)]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        shares = [f"{i}/{options.workers}" for i in range(options.workers)]
        results = list(pool.map(lambda share: run(tool, tests, share), shares))
    status = max(result.status for result in results)
    if any(result.is_partial for result in results):
        print(f"{tool} says nothing about all tests: some failed or were skipped, or none ran")
        return status or 1
    found = {
        "findings": sum(result.found or 0 for result in results),
        "tests": sum(result.passed for result in results),
    }
    print(json.dumps({"sanitizer": {tool: found}, **receipt.stamp("sanitizer", device.name())}))
    return status


class Result(NamedTuple):
    """
    found     how many findings the tool has counted, None if it does not say
    status    with which it ended
    passed    tests that did
    others    whether there were tests that did not
    """

    found: int | None
    status: int
    passed: int = 0
    others: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether not all tests were watched to their ends: a finding may well fail its test."""
        if self.found:
            return False
        return self.found is None or bool(self.status) or self.others or not self.passed


def run(tool: str, tests: list[str], share: str = "0/1") -> Result:
    """Runs a share of tests under a tool, and prints what they say."""
    watching = [SANITIZER, "--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "share"]
    changes = {
        "CUPY_PAGED_TEST_POOL": "off",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        share_of_tests.VARIABLE: share,
    }
    if tool == "racecheck":
        changes["CUPY_PAGED_TEST_DEFINE"] = "CUPY_PAGED_EVERY_LANE"  # see kernels/barriers.cuh
    found, passed, others = None, 0, False
    with subprocess.Popen(
        [*watching, *pytest, *tests],
        cwd=TESTS.parent,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(f"{share}  {line}", end="", flush=True)
            if summary := SUMMARY.search(line):
                found = (found or 0) + int(summary[1])
            if count := PASSED.search(line):
                passed += int(count[1])
            others = others or bool(NOT_PASSED.search(line))
    return Result(found, abs(process.returncode), passed, others)


if __name__ == "__main__":
    sys.exit(main())
