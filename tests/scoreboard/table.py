"""The table of docs/RELIABILITY.md: figures, each with the day, commit and device it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from scoreboard import records
from scoreboard.rows import ROWS, Figures, Row, words_of
from support import receipt


class Score(NamedTuple):
    """A row of the table."""

    what: str
    target: str
    found: str
    date: str
    commit: str
    device: str
    how: str
    is_met: bool


def _of_receipt(last: Figures, kept: Figures) -> dict[str, Any]:
    known = kept.get("receipt", {})
    return {
        "date": last["date"][:10],
        "device": last["devices"][0].partition(",")[0] if last["devices"] else "no device",
        "sources": last["sha256"],
        "commit": known.get("commit") if known.get("sources") == last["sha256"] else None,
        "failed": last["failed"],
        "figures": last.get("figures", {}),
    }


def _of_accuracy(kept: Figures) -> dict[str, Any]:
    """The accuracy is of the kernels and the package: tests have no part in it."""
    document = json.loads(records.ACCURACY.read_text())
    measured = document["environment"]
    digests, known = records.digests(measured), kept.get("accuracy", {})
    is_current = digests == records.digests()
    commit = measured["commit"] and measured["commit"][:10]
    if measured["changed_since_commit"]:
        commit = f"{commit} and changes"
    if known.get("sources") == digests:
        commit = known["commit"] or commit
    return {
        "date": measured["date"][:10],
        "device": measured["device"] or "CPU",
        "sources": receipt.digest() if is_current else measured["kernels_sha256"],
        "commit": commit,
        "rows": document["rows"],
    }


def scores() -> Iterator[Score | Row]:
    """A score for each row that was measured; the row itself where it was not."""
    kept, last, sources = records.read(), receipt.read(), receipt.digest()
    runs = {kind: [kept[kind]] for kind in kept.keys() - {"receipt", "accuracy", "host"}}
    runs["tests"] = [*([_of_receipt(last, kept)] if last else ()), *kept.get("host", ())]
    runs["accuracy"] = [_of_accuracy(kept)] if records.ACCURACY.exists() else []
    for row in ROWS:
        said = ((words, run) for run in runs.get(row.kind, ()) if (words := words_of(row, run)))
        if (first := next(said, None)) is None:
            yield row
            continue
        (words, is_met), run = first
        commit = run["commit"] or f"sources {run['sources'][:10]}"
        if not _is_current(row, run, sources):
            commit = f"measured at {commit}"
        how = f"`{row.how}`" if isinstance(row.how, str) else ", ".join(map(link, row.how))
        found = words if is_met else f"NOT MET: {words}"
        yield Score(row.what, row.target, found, run["date"], commit, run["device"], how, is_met)


def _is_current(row: Row, run: Figures, sources: str) -> bool:
    """Whether a run is of this tree, as far as the figure depends on it.

    Those of tests on the host depend on them as well, and keep their commit nevertheless: most of
    an edit to one file has nothing to do with most figures.
    """
    if row.kind == "tests" or "tests" not in run:
        return run["sources"] == sources
    beside = receipt.digest(names=receipt.BESIDE[row.kind.partition(" ")[0]])
    return (run["sources"], run["tests"]) == (sources, beside)


def link(test: str) -> str:
    """A link from docs/ to a test, "file::name" below tests/."""
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def unmet() -> list[str]:
    """What does not come to its target, or was not measured."""
    return [row.what for row in scores() if isinstance(row, Row) or not row.is_met]


def lines() -> list[str]:
    """The table, in Markdown."""
    found = list(scores())
    columns = "What", "Target", "Found", "Date", "Commit", "Device", "Counted by"
    made = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    made += [f"| {' | '.join(score[:-1])} |" for score in found if isinstance(score, Score)]
    missing = [f"- {row.what}" for row in found if isinstance(row, Row)]
    return [*made, "", "Not measured yet:", "", *missing] if missing else made
