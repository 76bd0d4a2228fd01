"""What stands between a hazard and a user.

`python tests/reliability.py [LOG ...]` writes docs/RELIABILITY.md: hazards that have bitten systems
of this kind, the tests that stop them here, and the scoreboard, which it prints as well. The last
line of each LOG is put on record first: what `python -m tests.fuzz`, `python -m tests.mutants`,
`python tests/soak.py` or `python tests/sanitize.py` has printed, or the file that a run of pytest
has written to CUPY_PAGED_FIGURES.
"""

# ruff: noqa: E501  (a table)

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest finds what tests import
sys.path.insert(0, str(Path(__file__).resolve().parent))

import scoreboard
from mutants.catalogue import MUTANTS
from support import receipt

PAGE = receipt.ROOT / "docs" / "RELIABILITY.md"


class Hazard(NamedTuple):
    """Something that goes wrong in such systems.

    tests    paths of files, or ids of tests, from `tests/` on
    """

    name: str
    tests: tuple[str, ...]


HAZARDS = (
    Hazard(
        "Wrong results that look right: a token, page or partition left out, a wrong scale, head or sign",
        ("test_fuzz.py", "gpu/test_fuzz.py", "test_attention.py", "gpu/test_attention.py"),
    ),
    Hazard(
        "NaN or infinity behind a sequence's end, or in blocks of nobody, reaches a result",
        ("support/attention_suite.py::test_dead_slots_and_wild_ids_change_nothing",),
    ),
    Hazard(
        "Offsets wrap at 2^31 elements, or block numbers at 2^16",
        ("gpu/test_large_pool.py", "gpu/test_block_ops.py::test_gathers_past_two_to_the_31_elements"),
    ),
    Hazard(
        "Empty sequences, empty batches, and sequences longer than their table",
        (
            "support/attention_suite.py::test_rows_without_tokens_are_zero",
            "support/attention_suite.py::test_rows_longer_than_their_table_are_nan",
            "support/attention_suite.py::test_an_empty_batch",
        ),
    ),
    Hazard("A row's bits depend on its company, on the device's size or on the run", ("gpu/test_bitwise.py",)),
    Hazard("Partial results of two empty sides, or of sides far apart, merge to NaN", ("test_merge.py", "gpu/test_merge.py")),
    Hazard("Padding rows and changed lengths in replays of a CUDA graph", ("gpu/test_graphs.py",)),
    Hazard("The wrong stream, or memory reused before the work that reads it", ("test_devices.py", "test_in_flight.py", "gpu/test_streams.py", "gpu/test_handoffs.py")),
    Hazard("The wrong device", ("gpu/test_devices.py",)),
    Hazard("Slots and blocks out of range write into what is not theirs", ("test_cache_ops.py", "test_checked_mode.py", "gpu/test_cache_ops.py", "gpu/test_block_ops.py", "gpu/test_checked_mode.py")),
    Hazard("A wrong call runs, or its error does not say what is wrong", ("test_errors.py",)),
    Hazard("An op overwrites what it reads", ("test_errors.py", "test_overlap.py")),
    Hazard("Old binaries of changed kernels, or kernels that do not compile for a chip", ("test_compile.py",)),
    Hazard("A cache of compiled kernels that is damaged, cannot be written, or is filled by many at once; a missing NVRTC, an old driver, a fork", ("test_kernel_cache.py", "gpu/test_kernel_cache.py")),
    Hazard("A call like an earlier one is not the same", ("test_prepared.py", "test_attention_plan.py")),
    Hazard("Blocks freed twice, lost, or evicted while in use", ("test_block_allocator.py", "test_sequences.py")),
    Hazard("A prefix is found that has other tokens, another salt, or was evicted", ("test_sequences.py",)),
    Hazard("A shared block is written without a copy", ("test_sequences.py", "test_kv_cache.py", "test_soak.py", "gpu/test_kv_cache.py")),
    Hazard("A step overtakes copies to or from the host", ("test_offload.py", "gpu/test_kv_cache.py")),
    Hazard("XLA runs, copies or records an op otherwise than it was called", ("test_interop_jax.py", "gpu/test_interop_jax.py")),
    Hazard("Memory of other producers is read too early, or as what it is not", ("test_frameworks.py", "gpu/test_protocols.py")),
    Hazard("Tests that cannot fail", ("test_mutants.py", "test_support.py")),
)  # fmt: skip


def page() -> str:
    """The text of docs/RELIABILITY.md."""
    return "\n".join([*_head(), *map(_row, HAZARDS), *_results(), ""])


def _head() -> list[str]:
    of_kernels = sum(mutant.file.startswith("kernels/") for mutant in MUTANTS)
    return [
        "# Reliability",
        "",
        "What has gone wrong in systems of this kind, and the tests that stop it here. Tests in",
        "`gpu/` need a CUDA device; the others run anywhere, on the NumPy reference and on stand-ins.",
        "",
        f"The tests are tested: {len(MUTANTS)} deliberate faults, {of_kernels} of them in kernels, must",
        "each turn tests red (`python -m tests.mutants`). `python -m tests.fuzz` draws as many more",
        "cases as are wanted, from any seed. This page is made by `python tests/reliability.py`.",
        "",
        "| Hazard | Tests |",
        "|---|---|",
    ]


def _row(hazard: Hazard) -> str:
    return f"| {hazard.name} | {', '.join(map(_link, hazard.tests))} |"


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def _results() -> list[str]:
    last = receipt.read()
    return [
        "",
        "## Last run on a GPU",
        "",
        f"{receipt.summary(last)}." if last else "None.",
        "",
        "## Scoreboard",
        "",
        "What was counted on the way, by tests that passed and by longer runs. A commit that a figure",
        '"was measured at" had other sources than the last run on a GPU.',
        "",
        *scoreboard.table(),
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
