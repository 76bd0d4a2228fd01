"""The mutants are of the sources as they are, and their runner tells the dead from the living."""

import json
import re
import sys
import threading
from collections import Counter

import pytest

from cupy_paged import compiler
from mutants import apply, runner
from mutants.catalogue import MUTANTS
from mutants.mutant import ROOT, Mutant
from mutants.runner import Result, Verdict

QUICK = "tests/test_reference.py::test_gqa"
FAULT = next(m for m in MUTANTS if m.fault == "scale is left out")._replace(tests=QUICK)
HARMLESS = Mutant(
    "a comment is changed",
    "cupy_paged/reference.py",
    "# a negative block must not count from the end",
    "# as it is",
    QUICK,
)
NO_PROGRAM = HARMLESS._replace(fault="it does not parse", new="\n    )")
NO_MODULE = FAULT._replace(fault="it cannot be imported", old="import numpy as np\n", new="")
STALE = HARMLESS._replace(fault="nothing is there", old="a text of no source")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_mutant_is_of_the_sources_as_they_are(mutant):
    text = mutant.text()
    assert text != (ROOT / mutant.file).read_text(encoding="utf-8")
    if mutant.file.endswith(".py"):
        compile(text, mutant.file, "exec")
    file, *names = mutant.tests.split("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    for suite in re.findall(r"from support\.(\w+_suite) import", source):  # of which it has tests
        source += (ROOT / "tests" / "support" / f"{suite}.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in source or f"class {name}" in source for name in names)


def test_no_two_mutants_are_alike():
    assert max(Counter(mutant.fault for mutant in MUTANTS).values()) == 1
    assert max(Counter(mutant[1:4] for mutant in MUTANTS).values()) == 1


def test_there_are_enough_of_every_kind():
    of_kernels = sum(mutant.file.startswith("kernels/") for mutant in MUTANTS)
    on_hosts = sum(not mutant.needs_gpu for mutant in MUTANTS)
    assert of_kernels >= 80
    assert on_hosts >= 100


@pytest.mark.parametrize(
    ("mutant", "verdict"),
    [
        (FAULT, "killed"),
        (HARMLESS, "SURVIVED"),
        (NO_PROGRAM, "INVALID"),
        (NO_MODULE, "INVALID"),
        (STALE, "INVALID"),
    ],
    ids=lambda value: getattr(value, "fault", None),
)
def test_the_runner_tells_them_apart(mutant, verdict, monkeypatch, capsys):
    monkeypatch.setattr(runner, "MUTANTS", [mutant])
    is_killed = verdict == "killed"
    assert runner.main(["--workers", "1"]) == (not is_killed)
    said = capsys.readouterr().out
    assert f"{verdict:8}  {mutant.fault}" in said
    assert f"{int(is_killed)} of 1 mutants killed" in said


def test_an_interrupted_run_says_what_was_judged(monkeypatch, capsys):
    is_over = threading.Event()
    killed, survived = Result(Verdict.KILLED, ""), Result(Verdict.SURVIVED, "")

    def interrupted(judged):
        judged[0].result()
        raise KeyboardInterrupt

    def leave(status):
        is_over.set()
        sys.exit(status)

    monkeypatch.setattr(runner, "MUTANTS", [FAULT, HARMLESS])
    monkeypatch.setattr(runner, "run_tests", lambda tests: survived)
    monkeypatch.setattr(runner, "judge", lambda one: killed if one is FAULT else is_over.wait())
    monkeypatch.setattr(runner.concurrent.futures, "wait", interrupted)
    monkeypatch.setattr(runner.os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        runner.main(["--workers", "2"])
    log = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert log["mutants"] == {FAULT.fault: "killed"}
    assert log["texts"] == {FAULT.fault: FAULT.digest()}
    assert len({mutant.digest() for mutant in (*MUTANTS, HARMLESS)}) == len(MUTANTS) + 1


def test_a_word_that_no_fault_has_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.main(["no such fault"])
    assert "no fault and no file has no such fault in it" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["masks.cuh", "combine_partitions.cu"])
def test_a_kernel_is_compiled_from_the_changed_text(file, monkeypatch):
    mutant = next(mutant for mutant in MUTANTS if mutant.file == f"kernels/{file}")
    monkeypatch.setattr(compiler, "kernel_dir", compiler.kernel_dir)  # to have it back
    compiler.flatten.cache_clear()
    top = "paged_attention.cu" if file.endswith("h") else file
    before = compiler.flatten(top)
    apply._change_kernel(mutant)
    compiler.flatten.cache_clear()
    try:
        assert compiler.flatten(top) == before.replace(mutant.old, mutant.new) != before
    finally:
        compiler.flatten.cache_clear()


def test_the_runner_asks_first_whether_tests_pass_without_a_mutant(monkeypatch, capsys):
    missing = FAULT._replace(tests="tests/test_reference.py::test_of_nothing")
    monkeypatch.setattr(runner, "MUTANTS", [missing])
    assert runner.main(["--workers", "1"]) == 1
    assert "fails without any mutant" in capsys.readouterr().out
