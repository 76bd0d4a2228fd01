"""What stands between a hazard and a user.

`python tests/reliability.py [LOG ...]` writes docs/RELIABILITY.md: hazards that have bitten systems
of this kind, the tests that stop them here, and the scoreboard, which it prints as well. The last
line of each LOG is put on record first: what `python -m tests.fuzz`, `python -m tests.mutants`,
`python tests/soak.py` or `python tests/sanitize.py` has printed, or the file that a run of pytest
has written to CUPY_PAGED_FIGURES.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest finds what tests import
sys.path.insert(0, str(Path(__file__).resolve().parent))

import scoreboard
from hazards import SECTIONS, Hazard
from mutants.catalogue import MUTANTS
from support import receipt

PAGE = receipt.ROOT / "docs" / "RELIABILITY.md"


def page() -> str:
    """The text of docs/RELIABILITY.md."""
    hazards = [line for name in SECTIONS for line in _section(name)]
    return "\n".join([*_head(), *hazards, *_results(), ""])


def _head() -> list[str]:
    on_gpu = len(scoreboard.FAULTS["gpu"])
    of_kernels = sum(mutant.file.startswith("kernels/") for mutant in MUTANTS)
    return [
        "# Reliability",
        "",
        "What has gone wrong in systems of this kind, and the tests that stop it here. Tests in",
        "`gpu/` need a CUDA device, and gpu/test_devices.py two; the others run anywhere, on the",
        "NumPy reference and on stand-ins. Suites in `support/` run in both places, with arrays of",
        "several frameworks. The last column says what none of the tests beside it shows.",
        "",
        f"The tests are tested: {len(MUTANTS)} deliberate faults, {of_kernels} of them in kernels,",
        f"are each to turn tests red (`python -m tests.mutants`); {on_gpu} of them need a GPU for",
        "that. `python -m tests.fuzz` draws as many more cases as are wanted, from any seed. This",
        "page is made by `python tests/reliability.py`.",
    ]


def _section(name: str) -> list[str]:
    table = ["| Hazard | Tests | Not shown |", "|---|---|---|"]
    return ["", f"## {name}", "", *table, *map(_row, SECTIONS[name])]


def _row(hazard: Hazard) -> str:
    return f"| {hazard.name} | {', '.join(map(_link, hazard.tests))} | {hazard.open} |"


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def _results() -> list[str]:
    last = receipt.read()
    commit = scoreboard.records().get("receipt", {}).get("commit")
    of_commit = f", of commit {commit}" if commit else ""
    return [
        "",
        "## Last run on a GPU",
        "",
        f"{receipt.summary(last)}{of_commit}." if last else "None.",
        "",
        "## Scoreboard",
        "",
        "What was counted on the way, by tests that passed and by longer runs. A commit that a",
        'figure "was measured at" had other sources than the last run on a GPU.',
        "",
        *scoreboard.table(),
        "",
        "Racecheck runs kernels in which every lane of a warp waits and signals for itself: it",
        "does not see that `__syncwarp` comes between what a lane does and what another one",
        "signals for all, and reports a race where there is none. So it does not show that the",
        "`__syncwarp` before such a signal is there; nothing here does. It looks at shared memory",
        "alone, which merging, writing, copying, swapping and converting do not use.",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    scoreboard.record(parser.parse_args(argv).logs)
    PAGE.write_text(page(), encoding="utf-8")
    print("\n".join(scoreboard.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
