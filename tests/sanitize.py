"""Runs a reduced grid of the GPU tests under compute-sanitizer: `python tests/sanitize.py [TOOL]`.

TOOL is memcheck (the default), initcheck, racecheck or synccheck. `--workers N` runs N processes of
tests side by side, with pytest-xdist: racecheck takes some minutes with one.

Memory pools are switched off: an access past the end of one array would otherwise land in the
pool's own memory and pass. For racecheck every lane waits and signals for itself: the tool takes
what one does for its warp, behind a __syncwarp, for a race. Exits with the sanitizer's status,
which is not 0 if it found anything or a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from support import device, receipt

TOOLS = "memcheck", "initcheck", "racecheck", "synccheck"
ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = (  # of kernels that use it, which is what racecheck looks at
    "tests/gpu/test_attention.py::test_matches_oracle",
    "tests/gpu/test_attention.py::test_matches_oracle_on_few_thread_blocks",
    "tests/gpu/test_attention.py::test_matches_oracle_on_the_paths_of_older_chips",
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/sanitize.py")
    parser.add_argument("tool", nargs="?", default=TOOLS[0], choices=TOOLS)
    parser.add_argument("--workers", type=int, metavar="N", help="processes, with pytest-xdist")
    options = parser.parse_args()
    tool = options.tool
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 2
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", ARRAYS]
    if options.workers:
        pytest += ["-n", str(options.workers)]
    pytest += SHARED_MEMORY if tool == "racecheck" else GRID
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest]
    changes = {"CUPY_PAGED_TEST_POOL": "off", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if tool == "racecheck":
        changes["CUPY_PAGED_TEST_DEFINE"] = "CUPY_PAGED_EVERY_LANE"  # see kernels/barriers.cuh
    found = None
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if summary := SUMMARY.search(line):
                found = (found or 0) + int(summary[1])
    if found is None or (process.returncode and not found):
        print(f"{tool} says nothing about all tests: some failed, or none ran")
        return process.returncode or 1
    print(json.dumps({"sanitizer": {tool: found}, **receipt.stamp(device.name())}))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
