"""The GPU receipt: what a run of tests/gpu found, and for which sources.

A machine without a GPU cannot run kernels, so a run on a machine with one leaves
tests/gpu_receipt.json behind, and `python -m support.receipt` (from tests/) says whether that
file still vouches for the tree: same sources, nothing failed, no unexpected skip.
"""

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = Path("tests/gpu_receipt.json")
PENDING = Path("tests/GPU_PENDING")
GPU_TESTS = Path("tests/gpu")

VOUCHED_FOR = (
    "cupy_paged", "kernels", "tests/conftest.py", "tests/fuzz", "tests/gpu", "tests/support",
)  # fmt: skip
SUFFIXES = frozenset({".py", ".cu", ".cuh"})

# Test id prefix -> why a skip there is expected.
EXPECTED_SKIPS: dict[str, str] = {}

OTHER_KERNELS = "CUPY_PAGED_EMULATE_SM", "CUPY_PAGED_TEST_DEFINE"
"""Variables that have kernels compiled that users do not get."""

BESIDE = {
    "fuzz": (),
    "mutants": ("tests/mutants/apply.py", "tests/mutants/runner.py"),
    "sanitizer": ("tests/sanitize.py", "tests/share.py", "tests/planted_faults.py"),
    "soak": ("tests/soak.py",),
    "figures": ("tests",),
}
"""By the kind of a log: what its figures depend on beside what the receipt vouches for."""

OUTCOMES = ("passed", "failed", "skipped")


def vouched_files(root: Path = ROOT, names: Iterable[str] = VOUCHED_FOR) -> list[Path]:
    """The sources that are, or are in, what the receipt vouches for, in a fixed order.

    Their paths are relative to `root`.
    """
    found = []
    for name in names:
        top = root / name
        found += [top] if top.is_file() else top.rglob("*")
    return sorted(
        (path.relative_to(root) for path in found if path.suffix in SUFFIXES and path.is_file()),
        key=Path.as_posix,
    )


def digest(root: Path = ROOT, names: Iterable[str] = VOUCHED_FOR) -> str:
    """One SHA-256 over the names and contents of `vouched_files`."""
    sha = hashlib.sha256()
    for path in vouched_files(root, names):
        content = (root / path).read_bytes()
        # The length keeps the end of one file from passing for the start of the next.
        sha.update(f"{path.as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def has_other_kernels() -> list[str]:
    """The variables of OTHER_KERNELS that are set."""
    return [name for name in OTHER_KERNELS if os.environ.get(name)]


def stamp(kind: str, device: str) -> dict[str, object]:
    """What a log says beside its figures: when, on what and of which sources it was measured.

    kind    one of BESIDE
    """
    from cupy_paged import info

    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.date().isoformat(),
        "device": device,
        "other_kernels": has_other_kernels(),
        "versions": info.framework_versions(),
        "sources": digest(),
        "tests": digest(names=BESIDE[kind]),
    }


def missing_test_files(collected: Iterable[Path], root: Path = ROOT) -> list[str]:
    """Test files under tests/gpu that are not among the `collected` ones."""
    seen = {Path(path).resolve() for path in collected}
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / GPU_TESTS).rglob("test_*.py"))
        if path.resolve() not in seen
    ]


def compose(
    outcomes: Mapping[str, tuple[str, str]],
    *,
    sha256: str,
    environment: Mapping[str, object],
    duration: float,
    figures: Mapping[str, Mapping[str, object]],
) -> dict:
    """A receipt from the outcome of every GPU test: id -> (one of OUTCOMES, reason).

    figures    what the tests that passed have counted, see support/tally.py
    """
    counts = dict.fromkeys(OUTCOMES, 0)
    for outcome, _ in outcomes.values():
        counts[outcome] += 1
    return {
        "sha256": sha256,
        **environment,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "duration_seconds": round(duration, 1),
        "collected": len(outcomes),
        **counts,
        "failures": sorted(name for name, (outcome, _) in outcomes.items() if outcome == "failed"),
        "skips": {
            name: reason
            for name, (outcome, reason) in sorted(outcomes.items())
            if outcome == "skipped"
        },
        "figures": figures,
    }


def describe_environment() -> dict[str, object]:
    """Device, driver, kernels and library versions, as the receipt records them."""
    from cupy_paged import compiler, driver, info

    return {
        "devices": [str(device) for device in driver.devices()],
        "driver": driver.driver_version(),
        "driver_cuda": driver.driver_cuda_version(),
        "nvrtc": info.nvrtc_version(),
        "kernels_sha256": compiler.sources_digest(),
        "python": platform.python_version(),
        "versions": info.framework_versions(),
    }


def write(receipt: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(receipt, indent=2) + "\n")


def read(root: Path = ROOT) -> dict | None:
    try:
        return json.loads((root / RECEIPT).read_text())
    except FileNotFoundError:
        return None


def problems(receipt: Mapping | None, sha256: str) -> list[str]:
    """Why `receipt` does not vouch for sources with this digest. Empty if it does."""
    if receipt is None:
        return [f"there is no {RECEIPT}"]
    found = []
    if receipt["sha256"] != sha256:
        found.append(
            f"it vouches for other sources: {receipt['sha256'][:12]}, the tree is {sha256[:12]}"
        )
    if receipt["failed"] or receipt["failures"]:
        found.append(f"{receipt['failed']} GPU tests failed: {', '.join(receipt['failures'])}")
    if not receipt["passed"]:
        found.append("no GPU test passed")
    if sum(receipt[outcome] for outcome in OUTCOMES) != receipt["collected"]:
        found.append(f"the outcomes do not add up to {receipt['collected']} collected tests")
    for name, reason in receipt["skips"].items():
        if not name.startswith(tuple(EXPECTED_SKIPS)):
            found.append(f"unexpected skip: {name} ({reason})")
    return found


def pending_reason(root: Path = ROOT) -> str | None:
    """The one line of tests/GPU_PENDING: why no GPU could be had. None if there is no file."""
    try:
        lines = (root / PENDING).read_text().strip().splitlines()
    except FileNotFoundError:
        return None
    if len(lines) != 1:
        raise ValueError(f"{PENDING}: {len(lines)} lines, needs one that gives the reason")
    return lines[0]


def summary(receipt: Mapping) -> str:
    device = ", ".join(receipt["devices"]) or "no device"
    counts = ", ".join(f"{receipt[outcome]} {outcome}" for outcome in OUTCOMES)
    without = "".join(f", without {path}" for path in receipt.get("left_out", ()))
    return f"{counts} on {device}, {receipt['date'][:10]}{without}"


def check(root: Path = ROOT) -> tuple[bool, str]:
    """Whether the tree may be merged as far as its kernels go, and the words for it."""
    receipt = read(root)
    found = problems(receipt, digest(root))
    if not found:
        return True, f"GPU receipt: matches this tree: {summary(receipt)}"
    lines = [f"GPU receipt: {problem}" for problem in found]
    reason = pending_reason(root)
    if reason is None:
        lines.append(f"Run `pytest` on a machine with a GPU and commit {RECEIPT}.")
        return False, "\n".join(lines)
    banner = "!" * 88
    warning = f"WARNING: THE KERNELS OF THIS TREE HAVE NOT BEEN RUN ON A GPU: {reason}"
    return True, "\n".join([banner, warning, *lines, banner])


if __name__ == "__main__":
    vouches, words = check()
    print(words)
    sys.exit(not vouches)
