"""What stands between a hazard and a user.

`python tests/reliability.py [LOG ...]` writes docs/RELIABILITY.md: the scoreboard, which it prints
as well, and hazards that have bitten systems of this kind, with the tests that stop them. The last
line of each LOG is put on record first: what `python -m tests.fuzz`, `python -m tests.mutants`,
`python tests/soak.py` or `python tests/sanitize.py` has printed, or the file that a run of pytest
has written to CUPY_PAGED_FIGURES. Exits with 1 where a target is not met.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest finds what tests import
sys.path.insert(0, str(Path(__file__).resolve().parent))

from hazards import SECTIONS, Hazard
from mutants.catalogue import MUTANTS
from scoreboard import records, table
from scoreboard.rows import FAULTS
from support import receipt

PAGE = receipt.ROOT / "docs" / "RELIABILITY.md"


def page() -> str:
    """The text of docs/RELIABILITY.md."""
    hazards = [line for name in SECTIONS for line in _section(name)]
    return "\n".join([*_results(), *_hazards(), *hazards, ""])


def _results() -> list[str]:
    last = receipt.read()
    commit = records.read().get("receipt", {}).get("commit")
    of_commit = f", of commit {commit}" if commit else ""
    return [
        "# Reliability",
        *_paragraph(
            """What was counted by tests that passed and by longer runs, and then what has gone
            wrong in systems of this kind, with the tests that stop it here. This page is made by
            `python tests/reliability.py`; [CONTRIBUTING](../CONTRIBUTING.md) says how figures get
            into it, and their record is `docs/reliability.json`."""
        ),
        "",
        "## Scoreboard",
        *_paragraph(
            f"""Last run of all tests that need a GPU, those in `tests/gpu`:
            {_summary(last)}{of_commit}."""
            if last
            else "The tests that need a GPU have not been run on one yet."
        ),
        *_paragraph(
            f"""Figures are of the present sources (kernels, package, and what tests on a GPU use;
            SHA-256 {receipt.digest()[:10]}), whichever commit they name: "measured at" marks those
            of others. One that does not come to its target is marked as NOT MET, and tests fail.
            What a command has counted, it counts again. What tests have counted is in the
            [receipt](../tests/gpu_receipt.json), where the device is a GPU; what those that need
            none have counted on a CPU, `CUPY_PAGED_FIGURES=FILE pytest` writes to a file, in an
            environment that has torch and JAX. A specialisation is what a kernel is compiled for:
            dtypes, layout, head size, block size, query heads per KV head, features."""
        ),
        "",
        *table.lines(),
        *_paragraph(
            """Each run of compute-sanitizer has to find a fault that was planted for the tool,
            before it is believed to find nothing. Racecheck watches a build of its own, which
            differs from the one that users get in this: every lane of a warp waits and signals for
            itself (CUPY_PAGED_EVERY_LANE in kernels/barriers.cuh). Where one lane signals for all,
            as it does for users, the tool does not see the `__syncwarp` that comes before, and
            takes what the others did for a race. So it does not show that this `__syncwarp` is
            there; nothing here does. It looks at shared memory alone, which merging, writing,
            copying, swapping and converting to fp8 do not use."""
        ),
    ]


def _summary(last: Mapping[str, Any]) -> str:
    """`receipt.summary`, with devices of one kind named once."""
    devices = Counter(last["devices"])
    named = [f"{count}x {device}" if count > 1 else device for device, count in devices.items()]
    return receipt.summary(last).replace(", ".join(last["devices"]), " and ".join(named))


def _hazards() -> list[str]:
    on_gpu = len(FAULTS["gpu"])
    of_kernels = sum(mutant.file.startswith("kernels/") for mutant in MUTANTS)
    return _paragraph(
        f"""Below are the hazards. Tests in `gpu/` need a CUDA device, and gpu/test_devices.py two;
        the others run anywhere, on the NumPy reference and on stand-ins. Suites in `support/` run
        in both places, with arrays of several frameworks. The last column says what none of the
        tests beside it shows. The tests are tested: each of {len(MUTANTS)} deliberate faults,
        {of_kernels} of them in kernels, is to turn tests red (`python -m tests.mutants`); {on_gpu}
        of them need a GPU for that. `python -m tests.fuzz` draws as many more cases as are wanted,
        from any seed."""
    )


def _paragraph(text: str) -> list[str]:
    return ["", *textwrap.wrap(" ".join(text.split()), 98, break_on_hyphens=False)]


def _section(name: str) -> list[str]:
    table = ["| Hazard | Tests | Not shown |", "|---|---|---|"]
    return ["", f"## {name}", "", *table, *map(_row, SECTIONS[name])]


def _row(hazard: Hazard) -> str:
    return f"| {hazard.name} | {', '.join(map(table.link, hazard.tests))} | {hazard.open} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG")
    try:
        records.record(parser.parse_args(argv).logs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    PAGE.write_text(page(), encoding="utf-8")
    print("\n".join(table.lines()))
    if missed := table.unmet():
        print("\n".join(["", "Not met, or not measured:", "", *(f"- {what}" for what in missed)]))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
