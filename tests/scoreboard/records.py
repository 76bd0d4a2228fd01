"""What is on record: the last finding of each kind of run, and on what.

Nothing is typed in: a log goes into docs/reliability.json as it is, with the commit that it is of.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import environment
from cupy_paged import compiler
from scoreboard.rows import FAULTS, ROWS, Figures, digest_of_tests, words_of
from support import receipt

RECORDS = receipt.ROOT / "docs" / "reliability.json"
"""By the kind of run: what it has found last, and on what."""
ACCURACY = receipt.ROOT / "benchmarks" / "results" / "accuracy.json"
STAMP = {"date", "device", "versions", "sources", "tests"}
"""What each log says beside its figures, and is kept of it: see receipt.stamp."""


def read() -> dict[str, Any]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record(logs: list[Path]) -> None:
    """Keeps the last line of each log, under its kind, and commits of the receipt and the accuracy.

    Raises ValueError for a log of no kind, of sources that it does not name, of kernels that users
    do not get, or of a run that did not come to its end.
    """
    kept = read()
    for log in logs:
        try:
            run = json.loads(log.read_text().strip().splitlines()[-1])
            kind = next(kind for kind in KEEP if kind in run)
        except (IndexError, ValueError, TypeError, StopIteration):
            raise ValueError(f"{log}: does not end with a figure of {', '.join(KEEP)}") from None
        if not run.keys() >= STAMP:
            raise ValueError(f"{log}: does not say which sources it is of, needs a new run")
        if changes := run.get("other_kernels"):
            raise ValueError(f"{log}: {' and '.join(changes)} had other kernels compiled")
        if run.get("not_run"):
            raise ValueError(f"{log}: {run['not_run']} cases did not run")
        is_of_tree = run["tests"] == receipt.digest(names=receipt.BESIDE[kind])
        commit = commit_of(run["sources"]) if is_of_tree else None
        stamp = {"commit": commit, **{key: run[key] for key in sorted(STAMP)}}
        KEEP[kind](kept, run, stamp)
    if last := receipt.read():
        _keep_commit(kept, "receipt", last["sha256"], last["sha256"])
    if ACCURACY.exists():
        measured = digests(json.loads(ACCURACY.read_text())["environment"])
        if measured == digests():
            _keep_commit(kept, "accuracy", measured, receipt.digest())
    text = json.dumps(kept, indent=1)
    text = re.sub(r"\[[\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # in a line
    RECORDS.write_text(text + "\n")


def _keep_commit(kept: dict[str, Any], kind: str, of: Any, sources: str) -> None:
    """Notes the commit of what has these digests, unless it was noted before."""
    known = kept.get(kind, {})
    is_known = known.get("sources") == of and known["commit"]
    kept[kind] = {"sources": of, "commit": known["commit"] if is_known else commit_of(sources)}


def digests(measured: Figures | None = None) -> list[str | None]:
    """Of the kernels and of the package, which accuracy depends on; by default, of this tree."""
    if measured is None:
        return [compiler.sources_digest(), environment.package_digest()]
    return [measured["kernels_sha256"], measured.get("package_sha256")]


def commit_of(sources: str) -> str | None:
    """The commit of this tree; None if it has not these sources."""
    if sources != receipt.digest():
        return None
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        counting = "cupy_paged", "kernels", "tests", f":!{receipt.RECEIPT.as_posix()}"
        changed = _git("status", "--porcelain", "--", *counting)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} and changes" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=receipt.ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _same_run(known: Figures | None, stamp: Figures) -> bool:
    """Whether both are of the same sources on the same device, so that they may be added up."""
    return known is not None and all(
        known.get(key) == stamp[key] for key in ("sources", "tests", "device")
    )


def _keep_fuzz(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    """Adds the cases of other seeds; a seed counts once, and its failures stay."""
    kind = f"fuzz {run['fuzz']}"
    seeds = dict(kept[kind]["seeds"]) if _same_run(kept.get(kind), stamp) else {}
    for seed, found in run["seeds"].items():
        before = seeds.get(seed, found)
        more = [failure for failure in found["failures"] if failure not in before["failures"]]
        longer = max(before, found, key=lambda one: one["cases"])
        seeds[seed] = {**longer, "failures": [*before["failures"], *more]}
    kept[kind] = {**stamp, "seeds": seeds}


def _keep_beside(
    kept: dict[str, Any], kind: str, name: str, found: Figures, stamp: Figures
) -> None:
    """Keeps findings by name beside those of the same kind that were found before."""
    before = kept[kind][name] if _same_run(kept.get(kind), stamp) else {}
    kept[kind] = {**stamp, name: {**before, **found}}


def _keep_mutants(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    for where, faults in FAULTS.items():
        found = {
            fault: {
                "verdict": verdict,
                "text": run["texts"][fault],
                "tests": digest_of_tests(fault),
            }
            for fault, verdict in sorted(run["mutants"].items())
            if fault in faults
        }
        if found:
            _keep_beside(kept, f"mutants {where}", "mutants", found, stamp)


def _keep_sanitizer(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    _keep_beside(kept, "sanitizer", "sanitizer", run["sanitizer"], stamp)


def _keep_last(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    kept["soak"] = {**stamp, "soak": run["soak"], "failures": run["failures"]}


def _keep_host_figures(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    """Keeps a run of tests, and of those before it the ones that have counted something else."""
    runs = [{**stamp, "failed": run["failed"], "figures": run["figures"]}, *kept.get("host", ())]
    rows = [row for row in ROWS if row.kind == "tests"]
    needed = [next((one for one in runs if words_of(row, one)), None) for row in rows]
    kept["host"] = [one for one in runs if one in needed]


KEEP = {
    "fuzz": _keep_fuzz,
    "mutants": _keep_mutants,
    "soak": _keep_last,
    "sanitizer": _keep_sanitizer,
    "figures": _keep_host_figures,
}
"""By the word that a log has for its kind."""
