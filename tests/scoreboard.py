"""Figures of what was run, each with the day, the commit and the device that it was found on.

They come from the GPU receipt, from logs of runs that are too long for a test, and from what tests
on the host have counted. Nothing here is typed in: `record` keeps a log in docs/reliability.json.
"""

# ruff: noqa: E501  (a table)

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cupy_paged.layouts import LAYOUTS, MAX_BLOCK_SIZE, MAX_HEAD_SIZE
from mutants.catalogue import MUTANTS
from sanitize import TOOLS
from support import receipt

RECORDS = receipt.ROOT / "docs" / "reliability.json"
"""By the kind of run: what it has found last, and on what."""
ACCURACY = receipt.ROOT / "benchmarks" / "results" / "accuracy.json"
NUM_STORAGES = 3 * 3 * len(LAYOUTS)
"""Dtypes of queries, times dtypes of caches for each, times layouts."""
FAULTS = {
    "gpu": frozenset(mutant.fault for mutant in MUTANTS if mutant.needs_gpu),
    "host": frozenset(mutant.fault for mutant in MUTANTS if not mutant.needs_gpu),
}
"""What is put in on purpose, by where the tests run that should notice."""

Figures = Mapping[str, Any]


class Row(NamedTuple):
    """
    what      is counted
    target    what it should come to
    kind      of the runs that it is from; "tests" for the receipt and tests on the host
    found     the words for it; raises KeyError for a run that has not counted it
    how       to count it again: a command, or tests as in hazards.py
    """

    what: str
    target: str
    kind: str
    found: Callable[[Figures], str]
    how: str | tuple[str, ...]


def _failures(count: int) -> str:
    return f"{count} failure" + "s" * (count != 1)


def _fuzz(run: Figures) -> str:
    seeds = sorted(map(int, run["seeds"]))
    cases = sum(seed["cases"] for seed in run["seeds"].values())
    failures = sum(len(seed["failures"]) for seed in run["seeds"].values())
    words = "seed" if len(seeds) == 1 else "seeds"
    drawn = f"{cases:,} from {words} {', '.join(map(str, seeds))}"
    return f"{drawn}, of {run['specialisations']} specialisations each; {_failures(failures)}"


def _accuracy(run: Figures) -> str:
    worst: dict[str, float] = {}
    for row in run["rows"]:
        ratio = row["error"] / row["reference_error"]
        worst[row["kind"]] = max(worst.get(row["kind"], 0.0), ratio)
    return "; ".join(f"{kind}: {ratio:.2f}" for kind, ratio in worst.items())


def _mutants(faults: frozenset[str]) -> Callable[[Figures], str]:
    def words(run: Figures) -> str:
        verdicts = {fault: run["mutants"].get(fault) for fault in sorted(faults)}
        count = list(verdicts.values()).count
        found = [f"{count('killed')} of {len(verdicts)}"]
        found += [f"{count(None)} not run"] * bool(count(None))
        others = {fault: said for fault, said in verdicts.items() if said not in ("killed", None)}
        return ", ".join([*found, *(f"{said}: {fault}" for fault, said in others.items())])

    return words


def _coverage(run: Figures) -> str:
    return (
        f"{run['storages']} of {NUM_STORAGES}; {run['head sizes']} of {MAX_HEAD_SIZE // 8} head "
        f"sizes, {run['block sizes']} of {MAX_BLOCK_SIZE} block sizes, {run['group sizes']} group "
        f"sizes, in {run['specialisations']:,} specialisations"
    )


def _largest(run: Figures) -> str:
    return f"{run['elements of a pool']:,} elements, offset {run['element offset']:,}"


def _soak(run: Figures) -> str:
    counts = run["soak"]
    return (
        f"{counts.get('steps', 0):,} steps of {counts.get('tokens', 0):,} tokens, "
        f"{counts.get('compared', 0):,} rows compared, "
        f"{counts.get('grown_bytes', 0) / 2**20:.1f} MiB grown in all processes together, "
        f"{_failures(len(run['failures']))}"
    )


def _hand_offs(run: Figures) -> str:
    return (
        f"{run['hand-offs']:,} in {run['ways of hand-offs']} ways; {run['late hand-offs']:,} times "
        "the data was seen to be still on its way when it was handed over"
    )


def _compiled(run: Figures) -> str:
    return f"{run['compiled kernels']:,}, over {run['architectures']} architectures together"


def _tools(run: Figures) -> str:
    found = {tool: run["sanitizer"].get(tool, "not run") for tool in TOOLS}
    return ", ".join(f"{tool}: {number}" for tool, number in found.items())


def _count(name: str) -> Callable[[Figures], str]:
    return lambda run: f"{run[name]:,}"


ROWS = (
    Row("Random calls of all operators together, on a GPU", "10,000, 0 failures", "fuzz gpu", _fuzz, "python -m tests.fuzz --cases 10000 --device gpu --workers 8"),
    Row("Random calls of all operators together, of the reference", "2,000, 0 failures", "fuzz host", _fuzz, "python -m tests.fuzz --cases 2000 --device host"),
    Row("Error against float64, as a multiple of the plain formula's in the same precision", "at most 2", "accuracy", _accuracy, "python -m benchmarks accuracy"),
    Row("Needles found at the edges of pages and partitions, and at the end", "all", "tests", _count("needles"), ("support/attention_suite.py::test_needle_at_every_page_and_partition_edge", "gpu/test_attention.py::test_needles_in_long_contexts", "gpu/test_attention.py::test_a_million_tokens")),
    Row("Faults put in on purpose that tests on a GPU notice", "all", "mutants gpu", _mutants(FAULTS["gpu"]), "python -m tests.mutants --workers 8"),
    Row("Faults put in on purpose that tests on the host notice", "all", "mutants host", _mutants(FAULTS["host"]), "python -m tests.mutants --workers 8"),
    Row("Dtypes x cache dtypes x layouts that were run", "all", "tests", _coverage, ("gpu/test_attention.py::test_matches_oracle",)),
    Row("Runs in a poisoned pool, of the same bits as in a clean one", "all", "tests", _count("poisoned pools"), ("support/attention_suite.py::test_dead_slots_and_wild_ids_change_nothing",)),
    Row("Largest pool, and the highest offset of an element in use", "more than 2^32 elements", "tests", _largest, ("gpu/test_large_pool.py::test_a_pool_of_more_elements",)),
    Row("Tokens of the longest sequence", "1,048,576", "tests", _count("tokens of a sequence"), ("gpu/test_attention.py::test_a_million_tokens",)),
    Row("Decode steps through `PagedKVCache`", "1,000,000, 0 failures", "soak", _soak, "python tests/soak.py --steps 1000000 --workers 8"),
    Row("Wrong calls refused by an error that names the argument", "200, all that are tried", "tests", _count("wrong calls"), ("test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",)),
    Row("Replays of CUDA graphs with other rows, lengths and tables", "10,000", "tests", _count("graph replays"), ("gpu/test_graphs.py::test_ten_thousand_replays",)),
    Row("Runs again that gave the same bits, 50 to 250 of each call", "all", "tests", _count("repeated runs"), ("gpu/test_bitwise.py::test_many_runs_give_the_same_bits",)),
    Row("Rows with the same bits alone and in other batches", "all", "tests", _count("rows in other batches"), ("gpu/test_bitwise.py::test_a_row_has_the_same_bits_in_any_batch", "support/attention_suite.py::test_row_alone_has_the_bits_it_has_in_a_batch")),
    Row("Hand-offs between frameworks and streams, none of which read stale data", "1,000 of each way", "tests", _hand_offs, ("gpu/test_handoffs.py::test_an_input_of_another_framework_is_awaited", "gpu/test_handoffs.py::test_an_output_of_another_framework_is_awaited_there", "gpu/test_handoffs.py::test_memory_may_be_reused_right_after_the_call")),
    Row("Findings of compute-sanitizer over a reduced grid", "0", "sanitizer", _tools, "python tests/sanitize.py TOOL --workers 8"),
    Row("Operations on the block pool, checked against a model", "10,000,000, 0 violations", "tests", _count("pool operations"), ("test_block_allocator.py::test_pool_agrees_with_a_simple_model", "test_sequences.py::test_pool_agrees_with_a_simple_model")),
    Row("Faults of the kernel cache survived", "12 kinds, all", "tests", _count("cache faults"), ("gpu/test_kernel_cache.py::test_a_damaged_entry_is_compiled_again", "gpu/test_kernel_cache.py::test_where_nothing_can_be_kept_ops_run_and_say_so_once")),
    Row("Processes that began together on an empty kernel cache, all of them right", "16", "tests", _count("cold starts"), ("gpu/test_kernel_cache.py::test_processes_that_start_together_are_all_right",)),
    Row("Specialisations compiled without a GPU, none of which spills", "all", "tests", _compiled, ("test_compile.py::test_kernels_compile_without_spills",)),
    Row("Merges of up to 8 ranks, any of them empty, in several orders, equal to the whole", "all patterns", "tests", _count("merges of ranks"), ("support/merge_suite.py::test_ranks_of_which_any_may_be_empty_in_any_order",)),
)  # fmt: skip


# ---- what is on record ----

STAMP = {"date", "device", "sources", "tests"}
"""What each log says beside its figures: see receipt.stamp."""


def records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record(logs: list[Path]) -> None:
    """Keeps the last line of each log, under its kind, and the commit of the receipt.

    Raises ValueError for a log of no kind, or of sources that it does not name.
    """
    kept = records()
    for log in logs:
        try:
            run = json.loads(log.read_text().strip().splitlines()[-1])
            kind = next(kind for kind in KEEP if kind in run)
        except (IndexError, ValueError, TypeError, StopIteration):
            raise ValueError(f"{log}: does not end with a figure of {', '.join(KEEP)}") from None
        if not run.keys() >= STAMP:
            raise ValueError(f"{log}: does not say which sources it is of, needs a new run")
        stamp = {"commit": commit_of(run["sources"]), **{key: run[key] for key in sorted(STAMP)}}
        KEEP[kind](kept, run, stamp)
    if last := receipt.read():
        sources, known = last["sha256"], kept.get("receipt", {})
        is_known = known.get("sources") == sources and known["commit"]
        commit = known["commit"] if is_known else commit_of(sources)
        kept["receipt"] = {"sources": sources, "commit": commit}
    RECORDS.write_text(json.dumps(kept, indent=1) + "\n")


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
    """Adds the cases of another seed; a seed counts once, and its failures stay."""
    kind = f"fuzz {run['fuzz']}"
    seeds = kept[kind]["seeds"] if _same_run(kept.get(kind), stamp) else {}
    cases, failures = run["cases"] - run["not_run"], run["failures"]
    if before := seeds.get(str(run["seed"])):
        cases = max(cases, before["cases"])
        failures = [*before["failures"], *(f for f in failures if f not in before["failures"])]
    seeds = seeds | {str(run["seed"]): {"cases": cases, "failures": failures}}
    kept[kind] = {**stamp, "seeds": seeds, "specialisations": run["specialisations"]}


def _keep_beside(
    kept: dict[str, Any], kind: str, name: str, found: Figures, stamp: Figures
) -> None:
    """Keeps findings by name beside those of the same kind that were found before."""
    before = kept[kind][name] if _same_run(kept.get(kind), stamp) else {}
    kept[kind] = {**stamp, name: {**before, **found}}


def _keep_mutants(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    for where, faults in FAULTS.items():
        if found := {fault: run["mutants"][fault] for fault in faults & run["mutants"].keys()}:
            _keep_beside(kept, f"mutants {where}", "mutants", dict(sorted(found.items())), stamp)


def _keep_sanitizer(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    _keep_beside(kept, "sanitizer", "sanitizer", run["sanitizer"], stamp)


def _keep_last(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    kept["soak"] = {**stamp, "soak": run["soak"], "failures": run["failures"]}


def _keep_host_figures(kept: dict[str, Any], run: Figures, stamp: Figures) -> None:
    """Keeps a run of tests, and of those before it the ones that have counted something else."""
    runs = [{**stamp, "failed": run["failed"], "figures": run["figures"]}, *kept.get("host", ())]
    rows = [row for row in ROWS if row.kind == "tests"]
    needed = [next((one for one in runs if _words(row, one)), None) for row in rows]
    kept["host"] = [one for one in runs if one in needed]


KEEP = {
    "fuzz": _keep_fuzz,
    "mutants": _keep_mutants,
    "soak": _keep_last,
    "sanitizer": _keep_sanitizer,
    "figures": _keep_host_figures,
}
"""By the word that a log has for its kind."""


# ---- the table ----


class Score(NamedTuple):
    """A row of the table."""

    what: str
    target: str
    found: str
    date: str
    commit: str
    device: str
    how: str


def _numbers(figures: Figures) -> Figures:
    """By name alone; of different things, how many there are."""
    return {
        name: len(value) if isinstance(value, list) else value
        for kind in figures.values()
        for name, value in kind.items()
    }


def _words(row: Row, run: Figures) -> str | None:
    """What a run says to a row. None if it has not counted that."""
    if row.kind != "tests":
        return row.found(run)
    try:
        words = row.found(_numbers(run["figures"]))
    except KeyError:
        return None
    return f"{words}; BUT {run['failed']} TESTS FAILED" if run["failed"] else words


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


def _of_accuracy(last: Figures | None, kept: Figures) -> dict[str, Any]:
    """The accuracy is of the kernels, whose digest stands for that of all sources."""
    document = json.loads(ACCURACY.read_text())
    environment = document["environment"]
    kernels = environment["kernels_sha256"]
    is_current = last is not None and last.get("kernels_sha256") == kernels
    commit = environment["commit"] and environment["commit"][:10]
    if environment["changed_since_commit"]:
        commit = f"{commit} and changes"
    if is_current:
        commit = _of_receipt(last, kept)["commit"] or commit
    return {
        "date": environment["date"][:10],
        "device": environment["device"] or "CPU",
        "sources": last["sha256"] if is_current else kernels,
        "commit": commit,
        "rows": document["rows"],
    }


def scores() -> Iterator[Score | Row]:
    """A score for each row that was measured; the row itself where it was not."""
    kept, last = records(), receipt.read()
    runs = {kind: [kept[kind]] for kind in kept if kind != "host"}
    runs["tests"] = [*([_of_receipt(last, kept)] if last else ()), *kept.get("host", ())]
    runs["accuracy"] = [_of_accuracy(last, kept)] if ACCURACY.exists() else []
    for row in ROWS:
        found = ((words, run) for run in runs.get(row.kind, ()) if (words := _words(row, run)))
        if (first := next(found, None)) is None:
            yield row
            continue
        words, run = first
        commit = run["commit"] or f"sources {run['sources'][:10]}"
        if last is None or run["sources"] != last["sha256"]:
            commit = f"measured at {commit}"
        how = f"`{row.how}`" if isinstance(row.how, str) else ", ".join(map(link, row.how))
        yield Score(row.what, row.target, words, run["date"], commit, run["device"], how)


def link(test: str) -> str:
    """A link from docs/ to a test, "file::name" below tests/."""
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def table() -> list[str]:
    """Lines of Markdown."""
    found = list(scores())
    columns = "What", "Target", "Found", "Date", "Commit", "Device", "Counted by"
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(score)} |" for score in found if isinstance(score, Score)]
    missing = [f"- {row.what}" for row in found if isinstance(row, Row)]
    return [*lines, "", "Not measured yet:", "", *missing] if missing else lines
