"""Figures of what was run, each with the day, the commit and the device that it was found on.

They come from the GPU receipt, from logs of runs that are too long for a test, and from what tests
on the host have counted. Nothing here is typed in: `record` keeps a log in docs/reliability.json.
"""

# ruff: noqa: E501  (a table)

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import soak
from benchmarks import environment
from cupy_paged import compiler
from cupy_paged.layouts import LAYOUTS, MAX_BLOCK_SIZE, MAX_HEAD_SIZE
from mutants.catalogue import MUTANTS
from sanitize import TOOLS
from support import receipt

RECORDS = receipt.ROOT / "docs" / "reliability.json"
"""By the kind of run: what it has found last, and on what."""
ACCURACY = receipt.ROOT / "benchmarks" / "results" / "accuracy.json"
NUM_STORAGES = 3 * 3 * len(LAYOUTS)
"""Dtypes of queries, times dtypes of caches for each, times layouts."""
NUM_HEAD_SIZES = MAX_HEAD_SIZE // 8
FAULTS = {
    "gpu": frozenset(mutant.fault for mutant in MUTANTS if mutant.needs_gpu),
    "host": frozenset(mutant.fault for mutant in MUTANTS if not mutant.needs_gpu),
}
"""What is put in on purpose, by where the tests run that should notice."""
TEXTS = {mutant.fault: mutant.digest() for mutant in MUTANTS}

Figures = Mapping[str, Any]


class Row(NamedTuple):
    """
    what      is counted
    target    what it should come to
    kind      of the runs that it is from; "tests" for the receipt and tests on the host
    found     the words for it; raises KeyError for a run that has not counted it
    is_met    whether that is the target
    how       to count it again: a command, or tests as in hazards.py
    """

    what: str
    target: str
    kind: str
    found: Callable[[Figures], str]
    is_met: Callable[[Figures], bool]
    how: str | tuple[str, ...]


def _failures(count: int) -> str:
    return f"{count} failure" + "s" * (count != 1)


class _Fuzz:
    """All seeds of a run together."""

    def __init__(self, run: Figures) -> None:
        seeds = run["seeds"].values()
        self.seeds = sorted(map(int, run["seeds"]))
        self.cases = sum(seed["cases"] for seed in seeds)
        self.failures = sum(len(seed["failures"]) for seed in seeds)
        self.specialisations = sum(seed["specialisations"] for seed in seeds)
        self.head_sizes = set().union(*(seed["head_sizes"] for seed in seeds))
        self.block_sizes = set().union(*(seed["block_sizes"] for seed in seeds))
        self.frameworks = sum((Counter(seed["frameworks"]) for seed in seeds), Counter())

    def __str__(self) -> str:
        first, last = self.seeds[0], self.seeds[-1]
        is_one_run = self.seeds == list(range(first, last + 1))
        words = f"{first} to {last}" if is_one_run else ", ".join(map(str, self.seeds))
        words = f"seeds {words}" if first < last else f"seed {first}"
        arrays = ", ".join(f"{name} {n:,}" for name, n in sorted(self.frameworks.items()))
        return (
            f"{self.cases:,} from {words}, of {self.specialisations:,} specialisations; attention "
            f"with {len(self.head_sizes)} of {NUM_HEAD_SIZES} head sizes and "
            f"{len(self.block_sizes)} of {MAX_BLOCK_SIZE} block sizes; {arrays}; "
            f"{_failures(self.failures)}"
        )


def _is_broad(cases: int, *frameworks: str) -> Callable[[Figures], bool]:
    def is_met(run: Figures) -> bool:
        found = _Fuzz(run)
        return (
            found.cases >= cases
            and not found.failures
            and len(found.head_sizes) == NUM_HEAD_SIZES
            and len(found.block_sizes) == MAX_BLOCK_SIZE
            and found.frameworks.keys() >= {*frameworks}
        )

    return is_met


def _worst(run: Figures) -> dict[str, float]:
    worst: dict[str, float] = {}
    for row in run["rows"]:
        ratio = row["error"] / row["reference_error"]
        worst[row["kind"]] = max(worst.get(row["kind"], 0.0), ratio)
    return worst


def _accuracy(run: Figures) -> str:
    return "; ".join(f"{kind}: {ratio:.2f}" for kind, ratio in _worst(run).items())


def _verdicts(run: Figures, faults: frozenset[str]) -> dict[str, str | None]:
    """By fault; None for one that was not judged, or not as it is now."""
    found = {fault: run["mutants"].get(fault) for fault in sorted(faults)}
    return {
        fault: one["verdict"] if one and one["text"] == TEXTS[fault] else None
        for fault, one in found.items()
    }


def _mutants(faults: frozenset[str]) -> Callable[[Figures], str]:
    def words(run: Figures) -> str:
        verdicts = _verdicts(run, faults)
        count = list(verdicts.values()).count
        found = [f"{count('killed')} of {len(verdicts)}"]
        found += [f"{count(None)} not run"] * bool(count(None))
        others = {fault: said for fault, said in verdicts.items() if said not in ("killed", None)}
        return ", ".join([*found, *(f"{said}: {fault}" for fault, said in others.items())])

    return words


def _all_killed(faults: frozenset[str]) -> Callable[[Figures], bool]:
    return lambda run: all(said == "killed" for said in _verdicts(run, faults).values())


def _coverage(run: Figures) -> str:
    return (
        f"{run['storages']} of {NUM_STORAGES}, with {run['head sizes']} head sizes, "
        f"{run['block sizes']} block sizes and {run['group sizes']} group sizes, in "
        f"{run['specialisations']:,} specialisations"
    )


def _largest(run: Figures) -> str:
    return f"{run['elements of a pool']:,} elements, offset {run['element offset']:,}"


def _soak(run: Figures) -> str:
    counts = run["soak"]
    grown = (counts.get(name, 0) / 2**20 for name in soak.GROWN)
    return (
        f"{counts.get('steps', 0):,} steps of {counts.get('tokens', 0):,} tokens, "
        f"{counts.get('compared', 0):,} rows compared, "
        "at most {:.1f} MiB grown in a process and {:.1f} in its pool, ".format(*grown)
        + _failures(len(run["failures"]))
    )


def _is_long(steps: int) -> Callable[[Figures], bool]:
    return lambda run: run["soak"].get("steps", 0) >= steps and not run["failures"]


def _hand_offs(run: Figures) -> str:
    return (
        f"{run['hand-offs']:,} in {run['ways of hand-offs']} ways; {run['late hand-offs']:,} times "
        "the data was seen to be still on its way when it was handed over"
    )


def _compiled(run: Figures) -> str:
    return f"{run['compiled kernels']:,}, over {run['architectures']} architectures together"


def _tools(run: Figures) -> str:
    words = {
        tool: f"{found['findings']} in {found['tests']} tests"
        for tool, found in run["sanitizer"].items()
    }
    return ", ".join(f"{tool}: {words.get(tool, 'not run')}" for tool in TOOLS)


def _all_clean(run: Figures) -> bool:
    found = run["sanitizer"]
    return all(
        tool in found and not found[tool]["findings"] and found[tool]["tests"] for tool in TOOLS
    )


def _count(name: str) -> Callable[[Figures], str]:
    return lambda run: f"{run[name]:,}"


def _at_least(**least: int) -> Callable[[Figures], bool]:
    """Whether figures, which are named with spaces, are so large."""
    return lambda run: all(run[name.replace("_", " ")] >= n for name, n in least.items())


ROWS = (
    Row("Random calls of all operators together, on a GPU", "10,000, all head and block sizes, 0 failures", "fuzz gpu", lambda run: str(_Fuzz(run)), _is_broad(10_000, "cupy", "torch", "jax"), "python -m tests.fuzz --seeds 10 --cases 1500 --device gpu --workers 8"),
    Row("Random calls of all operators together, of the reference", "2,000, all head and block sizes, 0 failures", "fuzz host", lambda run: str(_Fuzz(run)), _is_broad(2_000, "numpy", "torch", "jax"), "python -m tests.fuzz --seeds 10 --cases 200 --device host"),
    Row("Error against float64, as a multiple of the plain formula's in the same precision", "at most 2", "accuracy", _accuracy, lambda run: max(_worst(run).values()) <= 2, "python -m benchmarks accuracy"),
    Row("Needles found at the edges of pages and partitions, and at the end", "1,000, all", "tests", _count("needles"), _at_least(needles=1000), ("support/attention_suite.py::test_needle_at_every_page_and_partition_edge", "gpu/test_attention.py::test_needles_in_long_contexts", "gpu/test_attention.py::test_a_million_tokens")),
    Row("Faults put in on purpose that tests on a GPU notice", "all", "mutants gpu", _mutants(FAULTS["gpu"]), _all_killed(FAULTS["gpu"]), "python -m tests.mutants --workers 8"),
    Row("Faults put in on purpose that tests on the host notice", "all", "mutants host", _mutants(FAULTS["host"]), _all_killed(FAULTS["host"]), "python -m tests.mutants --workers 8"),
    Row("Dtypes x cache dtypes x layouts that were compared with float64", "all", "tests", _coverage, _at_least(storages=NUM_STORAGES), ("gpu/test_attention.py::test_matches_oracle",)),
    Row("Runs in a poisoned pool, of the same bits as in a clean one", "100, all", "tests", _count("poisoned pools"), _at_least(poisoned_pools=100), ("support/attention_suite.py::test_dead_slots_and_wild_ids_change_nothing",)),
    Row("Largest pool, and the highest offset of an element in use", "more than 2^32 elements", "tests", _largest, _at_least(elements_of_a_pool=2**32 + 1, element_offset=2**31 + 1), ("gpu/test_large_pool.py::test_a_pool_of_more_elements",)),
    Row("Tokens of the longest sequence", "1,048,576", "tests", _count("tokens of a sequence"), _at_least(tokens_of_a_sequence=2**20), ("gpu/test_attention.py::test_a_million_tokens",)),
    Row(f"Decode steps through `PagedKVCache`; one row of every {soak.CHECK_EVERY}th step is compared with the same sequence alone, and with float64", "1,000,000, 0 failures", "soak", _soak, _is_long(1_000_000), "python tests/soak.py --steps 1000000 --workers 8"),
    Row("Wrong calls refused by an error that names the argument", "200, all that are tried", "tests", _count("wrong calls"), _at_least(wrong_calls=200), ("test_errors.py::test_a_bad_call_is_refused_and_writes_nothing",)),
    Row("Wrong lengths, block ids, slots and offsets on a device that checked mode names, with their position and value", "all that are tried", "tests", _count("faults named in checked mode"), _at_least(faults_named_in_checked_mode=20), ("support/checked_suite.py::test_lengths", "support/checked_suite.py::test_blocks", "support/checked_suite.py::test_slots", "support/checked_suite.py::test_gathered_tokens")),
    Row("Replays of CUDA graphs with other rows, lengths and tables", "10,000", "tests", _count("graph replays"), _at_least(graph_replays=10_000), ("gpu/test_graphs.py::test_ten_thousand_replays",)),
    Row("Runs again that gave the same bits, 50 to 250 of each call", "2,000, all", "tests", _count("repeated runs"), _at_least(repeated_runs=2000), ("gpu/test_bitwise.py::test_many_runs_give_the_same_bits",)),
    Row("Rows with the same bits alone and in other batches", "10,000, all", "tests", _count("rows in other batches"), _at_least(rows_in_other_batches=10_000), ("gpu/test_bitwise.py::test_a_row_has_the_same_bits_in_any_batch", "support/attention_suite.py::test_row_alone_has_the_bits_it_has_in_a_batch")),
    Row("Hand-offs between frameworks and streams, none of which read stale data", "1,000 of each way", "tests", _hand_offs, lambda run: run["hand-offs"] >= 1000 * run["ways of hand-offs"] and run["late hand-offs"] > 0, ("gpu/test_handoffs.py::test_an_input_of_another_framework_is_awaited", "gpu/test_handoffs.py::test_an_output_of_another_framework_is_awaited_there", "gpu/test_handoffs.py::test_memory_may_be_reused_right_after_the_call")),
    Row("Findings of compute-sanitizer over a reduced grid", "0", "sanitizer", _tools, _all_clean, "python tests/sanitize.py TOOL --workers 8"),
    Row("Operations on the block pool, checked against a model", "10,000,000, 0 violations", "tests", _count("pool operations"), _at_least(pool_operations=10_000_000), ("test_block_allocator.py::test_pool_agrees_with_a_simple_model", "test_sequences.py::test_pool_agrees_with_a_simple_model")),
    Row("Kinds of damage to the kernel cache, after each of which ops run", "12, all that are tried", "tests", _count("cache faults"), _at_least(cache_faults=12), ("gpu/test_kernel_cache.py::test_a_damaged_entry_is_compiled_again", "gpu/test_kernel_cache.py::test_where_nothing_can_be_kept_ops_run_and_say_so_once")),
    Row("Processes that began together on an empty kernel cache, all of them right", "16", "tests", _count("cold starts"), _at_least(cold_starts=16), ("gpu/test_kernel_cache.py::test_processes_that_start_together_are_all_right",)),
    Row("Specialisations compiled without a GPU, none of which spills", "300, on all architectures", "tests", _compiled, _at_least(compiled_kernels=300, architectures=7), ("test_compile.py::test_kernels_compile_without_spills",)),
    Row("Merges of up to 8 ranks, any of them empty, in several orders, equal to the whole", "all patterns", "tests", _count("merges of ranks"), _at_least(merges_of_ranks=5000), ("support/merge_suite.py::test_ranks_of_which_any_may_be_empty_in_any_order",)),
)  # fmt: skip


# ---- what is on record ----

STAMP = {"date", "device", "versions", "sources", "tests"}
"""What each log says beside its figures, and is kept of it: see receipt.stamp."""


def records() -> dict[str, Any]:
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record(logs: list[Path]) -> None:
    """Keeps the last line of each log, under its kind, and commits of the receipt and the accuracy.

    Raises ValueError for a log of no kind, of sources that it does not name, or of kernels that
    users do not get.
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
        if changes := run.get("other_kernels"):
            raise ValueError(f"{log}: {' and '.join(changes)} had other kernels compiled")
        is_of_tree = run["tests"] == receipt.digest(names=receipt.BESIDE[kind])
        commit = commit_of(run["sources"]) if is_of_tree else None
        stamp = {"commit": commit, **{key: run[key] for key in sorted(STAMP)}}
        KEEP[kind](kept, run, stamp)
    if last := receipt.read():
        _keep_commit(kept, "receipt", last["sha256"], last["sha256"])
    if ACCURACY.exists():
        measured = _digests(json.loads(ACCURACY.read_text())["environment"])
        if measured == _digests():
            _keep_commit(kept, "accuracy", measured, receipt.digest())
    text = json.dumps(kept, indent=1)
    text = re.sub(r"\[[\d,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # in a line
    RECORDS.write_text(text + "\n")


def _keep_commit(kept: dict[str, Any], kind: str, of: Any, sources: str) -> None:
    """Notes the commit of what has these digests, unless it was noted before."""
    known = kept.get(kind, {})
    is_known = known.get("sources") == of and known["commit"]
    kept[kind] = {"sources": of, "commit": known["commit"] if is_known else commit_of(sources)}


def _digests(measured: Figures | None = None) -> list[str | None]:
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
            fault: {"verdict": verdict, "text": run["texts"][fault]}
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
    is_met: bool


def _numbers(figures: Figures) -> Figures:
    """By name alone; of different things, how many there are."""
    return {
        name: len(value) if isinstance(value, list) else value
        for kind in figures.values()
        for name, value in kind.items()
    }


def _words(row: Row, run: Figures) -> tuple[str, bool] | None:
    """What a run says to a row, and whether that is the target. None if it has not counted it."""
    if row.kind != "tests":
        return row.found(run), row.is_met(run)
    figures = _numbers(run["figures"])
    try:
        words, is_met = row.found(figures), row.is_met(figures)
    except KeyError:
        return None
    if run["failed"]:
        return f"{words}; BUT {run['failed']} TESTS FAILED", False
    return words, is_met


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
    document = json.loads(ACCURACY.read_text())
    measured = document["environment"]
    digests, known = _digests(measured), kept.get("accuracy", {})
    is_current = digests == _digests()
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
    kept, last, sources = records(), receipt.read(), receipt.digest()
    runs = {kind: [kept[kind]] for kind in kept.keys() - {"receipt", "accuracy", "host"}}
    runs["tests"] = [*([_of_receipt(last, kept)] if last else ()), *kept.get("host", ())]
    runs["accuracy"] = [_of_accuracy(kept)] if ACCURACY.exists() else []
    for row in ROWS:
        said = ((words, run) for run in runs.get(row.kind, ()) if (words := _words(row, run)))
        if (first := next(said, None)) is None:
            yield row
            continue
        (words, is_met), run = first
        commit = run["commit"] or f"sources {run['sources'][:10]}"
        if run["sources"] != sources:
            commit = f"measured at {commit}"
        how = f"`{row.how}`" if isinstance(row.how, str) else ", ".join(map(link, row.how))
        found = words if is_met else f"NOT MET: {words}"
        yield Score(row.what, row.target, found, run["date"], commit, run["device"], how, is_met)


def link(test: str) -> str:
    """A link from docs/ to a test, "file::name" below tests/."""
    file, _, name = test.partition("::")
    return f"[{name or file}](../tests/{file})"


def unmet() -> list[str]:
    """What does not come to its target, or was not measured."""
    return [row.what for row in scores() if isinstance(row, Row) or not row.is_met]


def table() -> list[str]:
    """Lines of Markdown."""
    found = list(scores())
    columns = "What", "Target", "Found", "Date", "Commit", "Device", "Counted by"
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(score[:-1])} |" for score in found if isinstance(score, Score)]
    missing = [f"- {row.what}" for row in found if isinstance(row, Row)]
    return [*lines, "", "Not measured yet:", "", *missing] if missing else lines
