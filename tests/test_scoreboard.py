"""The scoreboard has what was measured, with where it was; and what is put on record is checked."""

import json
import math
import re
import subprocess

import pytest

import reliability
import sanitize
from benchmarks import accuracy
from benchmarks.environment import package_digest
from cupy_paged import compiler
from mutants.catalogue import MUTANTS
from scoreboard import records, rows, table
from support import receipt

SOURCES, OTHERS = "5" * 64, "0" * 64
SOAK = {
    "soak": {
        "steps": 5000, "tokens": 70000, "compared": 51, "grown_bytes": 1 << 20,
        "grown_pool_bytes": 0,
    },
    "failures": [],
}  # fmt: skip
LONG = {"soak": {"steps": 10**6, "compared": 10**4 + 304}, "failures": []}
CLEAN = {"findings": 0, "tests": 12}


def fuzz(*seeds, where="gpu", **changes):
    seed = {
        "cases": 100, "failures": [], "specialisations": 9, "head_sizes": [8, 16],
        "block_sizes": [1, 3, 16], "frameworks": {"cupy": 60, "jax": 40},
    }  # fmt: skip
    return {"fuzz": where, "seeds": {str(n): seed | changes for n in seeds}, "not_run": 0}


def judged(*faults, verdict="killed"):
    return {
        "mutants": dict.fromkeys(faults, verdict),
        "texts": {fault: rows.BY_FAULT[fault].digest() for fault in faults},
    }


def drawn(cases, seeds, specialisations, cupy, jax, failures):
    return (
        f"NOT MET: {cases} from {seeds}, of {specialisations} specialisations drawn; attention "
        f"with 2 of 64 head sizes and 3 of 256 block sizes; cupy {cupy}, jax {jax}; {failures}"
    )


def of_receipt(**changes):
    given = {
        "sha256": SOURCES, "date": "2026-01-02T03:04:05+00:00",
        "devices": ["H, sm_90"], "failed": 0, "figures": {"sum": {"needles": 1234}},
    }  # fmt: skip
    return {**given, **changes}


class Desk:
    """A receipt and records of their own, at a commit."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.receipt = folder, of_receipt()
        self.commits = {SOURCES: "c0ffee"}
        monkeypatch.setattr(records, "RECORDS", folder / "records.json")
        monkeypatch.setattr(records, "ACCURACY", folder / "accuracy.json")
        monkeypatch.setattr(records, "commit_of", self.commits.get)
        monkeypatch.setattr(receipt, "digest", lambda *_, **__: SOURCES)
        monkeypatch.setattr(receipt, "read", lambda: self.receipt)

    def record(self, *runs):
        logs = []
        for i, run in enumerate(runs):
            logs.append(self.folder / f"{i}.log")
            logs[-1].write_text(f"what it says on the way\n{json.dumps(run)}\n")
        records.record(logs)

    def score(self, words):
        """The one score of which the name has these words. None if it was not measured."""
        (found,) = [score for score in table.scores() if words in score.what]
        return found if isinstance(found, table.Score) else None


@pytest.fixture
def desk(tmp_path, monkeypatch):
    return Desk(tmp_path, monkeypatch)


def run_of(kind, sources=SOURCES, device="H", **changes):
    stamp = {
        "date": "2026-01-03", "sources": sources, "tests": SOURCES, "device": device,
        "versions": {}, "other_kernels": [],
    }  # fmt: skip
    return {**kind, **stamp, **changes}


def figures(sources=SOURCES, failed=0, **sums):
    names = {name.replace("_", " "): count for name, count in sums.items()}
    return run_of({"figures": {"sum": names}, "failed": failed}, sources, "CPU")


def test_a_figure_of_the_receipt_has_its_day_device_and_commit(desk):
    desk.record()
    assert desk.score("Needles")[2:6] == ("1,234", "2026-01-02", "c0ffee", "H")
    desk.commits[SOURCES] = "decaf"
    desk.record()
    assert desk.score("Needles").commit == "c0ffee", "it is noted once"


def test_a_receipt_that_was_not_put_on_record_names_its_sources(desk):
    desk.record()
    desk.receipt = of_receipt(sha256=OTHERS)
    assert desk.score("Needles").commit == f"measured at sources {OTHERS[:10]}"
    desk.commits[OTHERS] = "decaf"
    desk.record()
    assert desk.score("Needles").commit == "measured at decaf"


def test_failed_tests_are_not_passed_over(desk):
    desk.receipt["failed"] = 2
    assert desk.score("Needles").found == "NOT MET: 1,234; BUT 2 TESTS FAILED"


def test_what_was_not_measured_is_listed(desk):
    measured = [line for line in table.lines() if line.startswith("| Needles")]
    missing = [line for line in table.lines() if line.startswith("- ")]
    assert len(measured) == 1 and len(missing) == len(rows.ROWS) - 1
    assert not any("Needles" in line for line in missing)
    desk.receipt = None
    assert not any(line.startswith("| Needles") for line in table.lines())


def test_a_run_of_other_sources_says_so(desk):
    desk.commits[OTHERS] = "decaf"
    desk.record(run_of(SOAK, OTHERS))
    score = desk.score("Decode steps")
    assert score.commit == "measured at decaf"
    assert score.found == (
        "NOT MET: 5,000 steps of 70,000 tokens, 51 rows compared, at most 1.0 MiB grown in a "
        "process and 0.0 in its pool, 0 failures"
    )
    desk.record(run_of(SOAK))
    assert desk.score("Decode steps").commit == "c0ffee"


def test_a_figure_is_stale_by_the_tree_and_not_by_the_receipt(desk, monkeypatch):
    desk.record(run_of(SOAK))
    monkeypatch.setattr(receipt, "digest", lambda *_, **__: OTHERS)
    for words in "Needles", "Decode steps":
        assert desk.score(words).commit == "measured at c0ffee"


def test_seeds_of_the_same_sources_add_up(desk):
    desk.record(run_of(fuzz(0, cases=99)), run_of(fuzz(2, failures=[{"case": 7}])))
    expected = drawn(199, "seeds 0, 2", 18, 120, 80, "1 failure")
    assert desk.score("together, on a GPU").found == expected
    desk.record(run_of(fuzz(2, cases=40)))
    assert desk.score("together, on a GPU").found == expected
    desk.record(run_of(fuzz(1)))
    expected = drawn(299, "seeds 0 to 2", 27, 180, 120, "1 failure")
    assert desk.score("together, on a GPU").found == expected
    desk.record(run_of(fuzz(0, where="host"), device="CPU"))
    assert desk.score("together, on a GPU").found == expected
    expected = drawn(100, "seed 0", 9, 60, 40, "0 failures")
    assert desk.score("together, of the ref").found == expected


@pytest.mark.parametrize("changes", [{"sources": OTHERS}, {"tests": OTHERS}, {"device": "another"}])
def test_runs_of_other_sources_or_devices_do_not_add_up(desk, changes):
    one, two = (judged(fault) for fault in sorted(rows.FAULTS["gpu"])[:2])
    tools = ({"sanitizer": {tool: CLEAN}} for tool in ("memcheck", "racecheck"))
    desk.record(run_of(fuzz(0)), run_of(one), run_of(next(tools)))
    desk.record(
        run_of(fuzz(1), **changes),
        run_of(two, **changes),
        run_of(next(tools), **changes),
    )
    expected = drawn(100, "seed 1", 9, 60, 40, "0 failures")
    assert desk.score("together, on a GPU").found == expected
    number = len(rows.FAULTS["gpu"])
    assert desk.score("on a GPU notice").found.startswith(f"NOT MET: 1 of {number}, ")
    assert desk.score("-sanitizer").found == (
        "NOT MET: memcheck: not run, initcheck: not run, racecheck: 0 in 12 tests, "
        "synccheck: not run"
    )


def test_mutants_and_tools_may_be_run_in_parts(desk):
    first, second, *rest, last = faults = sorted(rows.FAULTS["host"])
    run = judged(first, second)
    run["mutants"]["of an older catalogue"] = run["texts"]["of an older catalogue"] = "killed"
    run["texts"][second] = "of an older catalogue"
    desk.record(run_of(run))
    found = desk.score("on the host notice").found
    assert found == f"NOT MET: 1 of {len(faults)}, {len(faults) - 1} not run"
    desk.record(run_of(judged(*rest)))
    found = desk.score("on the host notice").found
    assert found == f"NOT MET: {len(faults) - 2} of {len(faults)}, 2 not run"
    desk.record(run_of(judged(second)), run_of(judged(last, verdict="SURVIVED")))
    found = desk.score("on the host notice").found
    assert found == f"NOT MET: {len(faults) - 1} of {len(faults)}, SURVIVED: {last}"
    desk.record(*(run_of({"sanitizer": {tool: CLEAN}}) for tool in sanitize.TOOLS))
    found = desk.score("-sanitizer").found
    assert found == ", ".join(f"{tool}: 0 in 12 tests" for tool in sanitize.TOOLS)


def test_mutants_of_kernels_and_of_the_host_may_be_run_on_two_machines(desk):
    host, gpu = (judged(*rows.FAULTS[where]) for where in ("host", "gpu"))
    assert {*host["mutants"], *gpu["mutants"]} == {mutant.fault for mutant in MUTANTS}
    desk.record(run_of(host, device="CPU"), run_of(gpu, device="H"))
    for words, device, run in ("on the host notice", "CPU", host), ("on a GPU notice", "H", gpu):
        number = len(run["mutants"])
        assert desk.score(words).found == f"{number} of {number}"
        assert desk.score(words).device == device


def test_a_run_of_other_tools_has_no_commit(desk, monkeypatch):
    of_the_soak = receipt.BESIDE["soak"]
    digests = {receipt.VOUCHED_FOR: SOURCES, of_the_soak: OTHERS}
    monkeypatch.setattr(receipt, "digest", lambda names=receipt.VOUCHED_FOR: digests[names])
    desk.record(run_of(SOAK))
    assert desk.score("Decode steps").commit == f"measured at sources {SOURCES[:10]}"
    digests[of_the_soak] = SOURCES
    desk.record(run_of(SOAK))
    assert desk.score("Decode steps").commit == "c0ffee"
    digests[of_the_soak] = OTHERS
    assert desk.score("Decode steps").commit == "measured at c0ffee"


def test_mutants_whose_tests_were_edited_since_are_counted(desk, monkeypatch):
    faults = rows.FAULTS["host"]
    desk.record(run_of(judged(*faults)))
    files = [rows.BY_FAULT[fault].tests.partition("::")[0] for fault in sorted(faults)]
    edited = files[0]
    number = files.count(edited)
    monkeypatch.setattr(receipt, "digest", lambda names=(): OTHERS if edited in names else SOURCES)
    assert desk.score("on the host notice").found == (
        f"{len(faults)} of {len(faults)}, {number} by tests in a file that was edited since"
    )


def test_figures_of_the_host_stay_until_they_are_counted_again(desk):
    desk.record(figures(OTHERS, wrong_calls=700, pool_operations=10))
    desk.record(figures(pool_operations=11))
    assert desk.score("Wrong calls")[2:4] == ("700", desk.score("block pool").date)
    assert desk.score("Wrong calls").commit == f"measured at sources {OTHERS[:10]}"
    assert desk.score("block pool").found == "NOT MET: 11"
    assert desk.score("block pool").commit == "c0ffee"
    desk.record(figures(wrong_calls=701))
    assert len(records.read()["host"]) == 2
    assert desk.score("Needles").device == "H", "the receipt comes first"


def ratios(worst=1.5):
    """Rows of all that accuracy is measured of; one of the first kind is the worst."""
    each = [1.5, *[1.0] * (len(accuracy.LENGTHS) * len(accuracy.LOGITS) - 1)]
    found = [(kind.name, ratio) for kind in accuracy.KINDS for ratio in each]
    found[1] = found[1][0], worst
    return [{"kind": kind, "error": 2.0 * ratio, "reference_error": 2.0} for kind, ratio in found]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ratios(worst=2.01), "NOT MET: float16: 2.01; bfloat16: 1.50"),
        (ratios(worst=math.nan), "NOT MET: float16: nan; bfloat16: 1.50"),
        (ratios()[1:], "NOT MET: float16: 1.50; bfloat16: 1.50"),
        (ratios(worst=2.0), "float16: 2.00; bfloat16: 1.50"),
    ],
    ids=["too large", "NaN", "not all were measured", "right"],
)
def test_accuracy_is_of_everything_and_a_number(desk, found, words):
    environment = {
        "date": "2026-01-03T00:00:00+00:00", "device": "H", "commit": "c0ffee" * 6,
        "changed_since_commit": False, "kernels_sha256": "kernels",
    }  # fmt: skip
    records.ACCURACY.write_text(json.dumps({"environment": environment, "rows": found}))
    assert desk.score("Error against").found.startswith(words)


@pytest.mark.parametrize("other", ["kernels_sha256", "package_sha256"])
def test_accuracy_is_of_these_kernels_and_this_package_or_says_so(desk, other):
    environment = {
        "date": "2026-01-03T00:00:00+00:00", "device": "H", "commit": "c0ffee" * 6,
        "changed_since_commit": False, "kernels_sha256": compiler.sources_digest(),
        "package_sha256": package_digest(),
    }  # fmt: skip
    document = {"environment": environment, "rows": ratios()}
    records.ACCURACY.write_text(json.dumps(document))
    score = desk.score("Error against")
    assert score.found.startswith("float16: 1.50; bfloat16: 1.50; ")
    assert score[3:6] == ("2026-01-03", "c0ffeec0ff", "H")
    environment["changed_since_commit"] = True
    records.ACCURACY.write_text(json.dumps(document))
    assert desk.score("Error against").commit == "c0ffeec0ff and changes"
    desk.record()
    assert desk.score("Error against").commit == "c0ffee", "which has what was measured"
    environment[other], environment["changed_since_commit"] = "others", False
    records.ACCURACY.write_text(json.dumps(document))
    assert desk.score("Error against").commit == "measured at c0ffeec0ff"


def test_different_things_are_counted(desk):
    names = {name: ["1", "2", "3"] for name in ("storages", "block sizes", "group sizes")}
    each = {**names, "head sizes": ["8", "16"]}
    desk.receipt["figures"] = {"sum": {"specialisations": 1200}, "each": each}
    found = desk.score("Dtypes x cache dtypes").found
    assert found.startswith("NOT MET: 3 of 27, with 2 head sizes, 3 block sizes and 3 group sizes")


def test_every_name_that_a_test_counts_by_is_read_by_a_row():
    class Reader(dict):
        def __missing__(self, name):
            return self.setdefault(name, 1)

    reader = Reader()
    for row in rows.ROWS:
        if row.kind == "tests":
            row.found(reader)
            row.is_met(reader)
    counted = set()
    for path in (receipt.ROOT / "tests").rglob("*.py"):
        if path.name != "test_receipt.py":  # its names are of tests in other trees
            text = path.read_text(encoding="utf-8")
            counted |= set(re.findall(r"\btally(?:\.most|\.each)?\(\s*\"([^\"]+)\"", text))
    assert counted <= reader.keys()
    assert len(counted) >= 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not end with a figure of fuzz, mutants"),
        ("Traceback\nKilled\n", "does not end with a figure"),
        ("3\n", "does not end with a figure"),
        ('{"speed": 1}\n', "does not end with a figure"),
        ('{"soak": {}, "failures": [], "device": "H"}\n', "does not say which sources"),
        (json.dumps(run_of(fuzz(0), not_run=2)), "2 cases did not run"),
        (json.dumps(run_of(SOAK, other_kernels=["X", "Y"])), "X and Y had other kernels compiled"),
    ],
)
def test_a_log_without_a_figure_is_refused(desk, text, words):
    (desk.folder / "log").write_text(text)
    with pytest.raises(ValueError, match=words):
        records.record([desk.folder / "log"])
    assert records.read() == {}


def test_the_commit_is_known_for_the_sources_of_the_tree_alone(tmp_path, monkeypatch):
    def git(*arguments):
        who = "-c", "user.name=x", "-c", "user.email=x"
        command = ["git", *who, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    files = "cupy_paged/x.py", "kernels/x.cu", "tests/test_x.py", receipt.RECEIPT.as_posix()
    for name in files:
        write(name, "1")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(receipt, "ROOT", tmp_path)
    monkeypatch.setattr(receipt, "digest", lambda: SOURCES)
    head = git("rev-parse", "--short=10", "HEAD")
    assert records.commit_of(OTHERS) is None
    assert records.commit_of(SOURCES) == head
    write(receipt.RECEIPT.as_posix(), "2")
    assert records.commit_of(SOURCES) == head
    for name in files[:3]:
        write(name, "2")
        assert records.commit_of(SOURCES) == f"{head} and changes", name
        git("checkout", name)


def test_the_command_prints_the_table_and_writes_the_page(desk, monkeypatch, capsys):
    monkeypatch.setattr(reliability, "PAGE", desk.folder / "page.md")
    desk.receipt |= {"passed": 1, "skipped": 0}
    (desk.folder / "log").write_text(json.dumps(run_of(SOAK)))
    assert reliability.main([str(desk.folder / "log")]) == 1, "targets are not met"
    assert "5,000 steps" in capsys.readouterr().out
    assert "5,000 steps" in reliability.PAGE.read_text()


def test_a_log_that_is_none_is_an_error_of_the_command_line(desk, monkeypatch, capsys):
    monkeypatch.setattr(reliability, "PAGE", desk.folder / "page.md")
    with pytest.raises(SystemExit, match="2"):
        reliability.main([str(desk.folder / "no such log")])
    assert "no such log" in capsys.readouterr().err
    assert not reliability.PAGE.exists()


@pytest.mark.parametrize(
    "missed",
    [
        {"failures": [{"case": 1}]},
        {"cases": 9_999},
        {"head_sizes": [8, 16]},
        {"block_sizes": [16]},
        {"frameworks": {"cupy": 10_000}},
    ],
    ids=lambda missed: next(iter(missed)),
)
def test_random_calls_are_enough_only_if_they_are_of_everything(desk, missed):
    whole = {
        "cases": 10_000, "head_sizes": list(range(8, 513, 8)), "block_sizes": list(range(1, 257)),
        "frameworks": {"cupy": 9_998, "jax": 1, "torch": 1},
    }  # fmt: skip
    desk.record(run_of(fuzz(0, **whole)))
    assert desk.score("together, on a GPU").is_met
    desk.record(run_of(fuzz(0, **whole | missed), tests=OTHERS))
    assert not desk.score("together, on a GPU").is_met


@pytest.mark.parametrize(
    ("row", "good", "bad"),
    [
        ("Decode", LONG, SOAK),
        ("Decode", LONG, LONG | {"failures": ["it grew"]}),
        ("Decode", LONG, LONG | {"device": "CPU"}),
        ("Decode", LONG, LONG | {"soak": {"steps": 10**6, "compared": 0}}),
        (
            "-sanitizer",
            {"sanitizer": dict.fromkeys(sanitize.TOOLS, CLEAN)},
            {"sanitizer": {"racecheck": {"findings": 1, "tests": 12}}},
        ),
        (
            "-sanitizer",
            {"sanitizer": dict.fromkeys(sanitize.TOOLS, CLEAN)},
            {"sanitizer": {"memcheck": {"findings": 0, "tests": 0}}},
        ),
        ("block pool", figures(pool_operations=10**7), figures(pool_operations=10**7, failed=1)),
        ("block pool", figures(pool_operations=10**7), figures(pool_operations=10**7 - 1)),
    ],
)
def test_a_target_is_met_or_not(desk, row, good, bad):
    desk.record(run_of({}) | good)
    (met,) = [score for score in table.scores() if row in score.what]
    assert met.is_met and "NOT MET" not in met.found
    desk.record(run_of({}) | bad)
    (missed,) = [score for score in table.scores() if row in score.what]
    assert not missed.is_met and missed.found.startswith("NOT MET: ")
    assert missed.what in table.unmet()
