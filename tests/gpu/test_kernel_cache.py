"""First calls of ops in new processes, whatever has become of the cache, its folder and the fork.

All processes start together, and each test waits for its own; where tests are spread over workers
of pytest-xdist, a test starts those that it waits for. tests/test_kernel_cache.py has what needs no
GPU.
"""

import concurrent.futures
import functools
import os
import shutil

import pytest

from support import cache_faults, first_calls, frameworks
from support.cache_faults import DAMAGES, ENTRIES, USELESS_FOLDERS
from support.receipt import ROOT

NUM_KERNELS = 2
COLD_STARTS = [f"cold start {number}" for number in range(16)]
EDIT = "\nnamespace cupy_paged { struct Edited; }\n"
FRAMEWORKS = [arrays.name for arrays in frameworks.device(0) if arrays.name in first_calls.ARRAYS]


class Processes:
    """Processes by name, on folders of their own."""

    def __init__(self, folder, workers):
        self._folder, self._workers = folder, workers
        self._planned, self._started = {}, {}

    def folder(self, name):
        made = self._folder / name.replace(" ", "-")
        made.mkdir()
        return made

    def plan(self, name, what, *arguments, cache, **options):
        options.setdefault("env", {k: v for k, v in os.environ.items() if "CUPY_CACHE" not in k})
        options["CUPY_CACHE_DIR"] = str(cache)
        self.plan_function(name, first_calls.run, what, *arguments, **options)

    def plan_function(self, name, function, *arguments, **options):
        self._planned[name] = functools.partial(function, *arguments, **options)

    def start(self, *names):
        for name in names or self._planned:
            if name not in self._started:
                self._started[name] = self._workers.submit(self._planned[name])

    def result(self, name):
        self.start(name)
        return self._started[name].result()


def calls_between_edits(folder):
    """What processes say of the package as it is, with an edited header, and as it was again."""
    for part in "cupy_paged", "kernels":
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=without)
    header = folder / "kernels" / "dtypes.cuh"
    original, said = header.read_text(), []
    for text in original, original + EDIT, original:
        header.write_text(text)
        said.append(first_calls.run("ops", root=folder, CUPY_CACHE_DIR=str(folder / "cache")))
    return said


def plan_all(processes, filled):
    for name, make in USELESS_FOLDERS.items():
        processes.plan(name, "ops", cache=make(processes.folder(name)))
    unwritable = cache_faults.unwritable(processes.folder("below read-only"))
    processes.plan("below read-only", "ops", cache=unwritable / "new")
    processes.plan("a full disk", "ops_on_a_full_disk", cache=processes.folder("a full disk"))
    processes.plan("bare", "ops", cache=processes.folder("bare"), env={})
    processes.plan("threads", "ops_in_threads", "32", cache=processes.folder("threads"))
    processes.plan("after fork", "ops_after_fork", cache=filled)
    for name in FRAMEWORKS:
        processes.plan(f"before fork, {name}", "ops_before_fork", name, cache=filled)
    cold, present = processes.folder("cold start"), processes.folder("those who came")
    for name in COLD_STARTS:
        processes.plan(name, "ops_together", str(present), str(len(COLD_STARTS)), cache=cold)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    filled = tmp_path_factory.mktemp("filled")
    # Those that start together wait for each other, and need a place each.
    places = max(os.cpu_count() or 1, len(COLD_STARTS))
    with concurrent.futures.ThreadPoolExecutor(places) as workers:
        processes = Processes(folder, workers)
        processes.plan("first", "ops", cache=filled)
        said = processes.result("first")
        assert said["right"] and len(said["compiled"]) == NUM_KERNELS
        processes.plan_function("edited", calls_between_edits, processes.folder("edited"))
        for name, damage in DAMAGES.items():
            cache = shutil.copytree(filled, folder / f"damaged {name}")
            damage(*sorted(cache.glob(ENTRIES)))
            processes.plan(f"damaged {name}", "ops", cache=cache)
        plan_all(processes, filled)
        processes.plan("second", "ops", cache=filled)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            processes.start()
        yield processes


def test_a_second_process_compiles_nothing(processes):
    said = processes.result("second")
    assert said["right"]
    assert said["compiled"] == said["warnings"] == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again(processes, damage, tally):
    said = processes.result(f"damaged {damage}")
    assert said["right"], "a damaged entry was run"
    assert len(said["compiled"]) == (2 if "swapped" in damage else 1)
    tally.each("cache faults", damage)


@pytest.mark.parametrize("fault", [*USELESS_FOLDERS, "below read-only", "a full disk"])
def test_where_nothing_can_be_kept_ops_run_and_say_so_once(processes, fault, tally):
    said = processes.result(fault)
    assert said["right"]
    assert len(said["compiled"]) == NUM_KERNELS
    (warning,) = said["warnings"]
    assert "set CUPY_CACHE_DIR to a folder" in warning
    tally.each("cache faults", fault)


def test_a_bare_environment_is_enough(processes):
    said = processes.result("bare")
    assert said["right"]
    assert said["warnings"] == []


def test_threads_that_call_first_compile_each_kernel_once(processes):
    said = processes.result("threads")
    assert said["right"]
    assert len(said["compiled"]) == len(set(said["compiled"])) == NUM_KERNELS


def test_processes_that_start_together_are_all_right(processes, tally):
    processes.start(*COLD_STARTS)
    said = [processes.result(name) for name in COLD_STARTS]
    assert all(one["right"] for one in said)
    assert not any(one["warnings"] for one in said)
    assert all(len(one["compiled"]) <= NUM_KERNELS for one in said)
    assert any(one["compiled"] for one in said)
    tally("cold starts", len(COLD_STARTS))


def test_an_import_uses_no_cuda_so_that_children_can(processes):
    said = processes.result("after fork")
    assert said["child"] == {"right": True}
    assert said["right"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cuda_used_before_a_fork_is_a_clear_error_in_the_child(processes, framework):
    said = processes.result(f"before fork, {framework}")
    words = {"torch": "forked"}.get(framework, "CUDA was used before this process was forked")
    for child in said["children"]:
        assert words in (child["error"] or ""), child
    assert said["right"], "the parent cannot go on"


def test_an_edited_header_is_compiled_and_what_it_was_is_found_again(processes):
    first, edited, again = processes.result("edited")
    assert first["right"] and edited["right"] and again["right"]
    assert len(first["compiled"]) == len(edited["compiled"]) == NUM_KERNELS
    assert again["compiled"] == []
