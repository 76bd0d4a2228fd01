"""What is counted, what it should come to, and the words for it."""

# ruff: noqa: E501  (a table)

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import soak
from benchmarks import accuracy
from cupy_paged.layouts import LAYOUTS, MAX_BLOCK_SIZE, MAX_HEAD_SIZE
from mutants.catalogue import MUTANTS
from sanitize import TOOLS
from support import receipt

NUM_STORAGES = 3 * 3 * len(LAYOUTS)
"""Dtypes of queries, times dtypes of caches for each, times layouts."""
NUM_HEAD_SIZES = MAX_HEAD_SIZE // 8
FAULTS = {
    "gpu": frozenset(mutant.fault for mutant in MUTANTS if mutant.needs_gpu),
    "host": frozenset(mutant.fault for mutant in MUTANTS if not mutant.needs_gpu),
}
"""What is put in on purpose, by where the tests run that should notice."""
BY_FAULT = {mutant.fault: mutant for mutant in MUTANTS}

Figures = Mapping[str, Any]


class Row(NamedTuple):
    """
    what      is counted
    target    what it should come to
    kind      of the runs that it is from; "tests" for the receipt and tests on the host
    found     the words for it; this and the next raise KeyError for a run that has not counted it
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
            f"{self.cases:,} from {words}, of {self.specialisations:,} specialisations drawn; "
            f"attention with {len(self.head_sizes)} of {NUM_HEAD_SIZES} head sizes and "
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


def _ratios(run: Figures) -> dict[str, list[float]]:
    """By kind, for each length and size of the logits."""
    ratios: dict[str, list[float]] = {kind.name: [] for kind in accuracy.KINDS}
    for row in run["rows"]:
        ratios[row["kind"]].append(row["error"] / row["reference_error"])
    return ratios


def _largest_ratio(ratios: list[float]) -> float:
    """NaN if any of them is, or if there is none."""
    return max(ratios, key=lambda ratio: (math.isnan(ratio), ratio), default=math.nan)


def _accuracy(run: Figures) -> str:
    ratios = _ratios(run)
    return "; ".join(f"{kind}: {_largest_ratio(found):.2f}" for kind, found in ratios.items())


def _is_accurate(run: Figures) -> bool:
    each = len(accuracy.LENGTHS) * len(accuracy.LOGITS)
    return all(
        len(found) == each and _largest_ratio(found) <= accuracy.TARGET
        for found in _ratios(run).values()
    )


def digest_of_tests(fault: str) -> str:
    """Of the file of the tests that should notice a fault."""
    return receipt.digest(names=[BY_FAULT[fault].tests.partition("::")[0]])


def _verdicts(run: Figures, faults: frozenset[str]) -> dict[str, str | None]:
    """By fault; None for one that was not judged, or not as it is now."""
    found = {fault: run["mutants"].get(fault) for fault in sorted(faults)}
    return {
        fault: one["verdict"] if one and one["text"] == BY_FAULT[fault].digest() else None
        for fault, one in found.items()
    }


def _mutants(faults: frozenset[str]) -> Callable[[Figures], str]:
    def words(run: Figures) -> str:
        verdicts = _verdicts(run, faults)
        count = list(verdicts.values()).count
        found = [f"{count('killed')} of {len(verdicts)}"]
        found += [f"{count(None)} not run"] * bool(count(None))
        others = {fault: said for fault, said in verdicts.items() if said not in ("killed", None)}
        changed = sum(
            run["mutants"][fault]["tests"] != digest_of_tests(fault)
            for fault, said in verdicts.items()
            if said == "killed"
        )
        found += [f"{changed} by tests in a file that was edited since"] * bool(changed)
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
    def is_met(run: Figures) -> bool:
        counts = run["soak"]
        # Each worker compares a row less than that at most.
        compared = counts.get("compared", 0) * soak.CHECK_EVERY >= 0.99 * steps
        is_on_gpu = run["device"] != "CPU"
        return counts.get("steps", 0) >= steps and compared and is_on_gpu and not run["failures"]

    return is_met


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
    """Whether figures are so large: their names have spaces, where those of arguments cannot."""
    return lambda run: all(run[name.replace("_", " ")] >= n for name, n in least.items())


ROWS = (
    Row("Random calls of all operators together, on a GPU", "10,000, all head and block sizes, 0 failures", "fuzz gpu", lambda run: str(_Fuzz(run)), _is_broad(10_000, "cupy", "torch", "jax"), "python -m tests.fuzz --seeds 10 --cases 1500 --device gpu --workers 8"),
    Row("Random calls of all operators together, of the reference", "2,000, all head and block sizes, 0 failures", "fuzz host", lambda run: str(_Fuzz(run)), _is_broad(2_000, "numpy", "torch", "jax"), "python -m tests.fuzz --seeds 10 --cases 200 --device host"),
    Row("Error against float64, as a multiple of the plain formula's in the same precision", "at most 2", "accuracy", _accuracy, _is_accurate, "python -m benchmarks accuracy"),
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


def _numbers(figures: Figures) -> Figures:
    """By name alone; of different things, how many there are."""
    return {
        name: len(value) if isinstance(value, list) else value
        for kind in figures.values()
        for name, value in kind.items()
    }


def words_of(row: Row, run: Figures) -> tuple[str, bool] | None:
    """What a run says to a row, and whether that is the target. None if it has not counted it."""
    figures = _numbers(run["figures"]) if row.kind == "tests" else run
    try:
        words, is_met = row.found(figures), row.is_met(figures)
    except KeyError:
        return None
    if run.get("failed"):
        return f"{words}; BUT {run['failed']} TESTS FAILED", False
    return words, is_met
