"""The scoreboard has what was measured, with where it was; and what is put on record is checked."""

import json
import re
import subprocess

import pytest

import reliability
import sanitize
import scoreboard
from mutants.catalogue import MUTANTS
from support import receipt

SOURCES, OTHERS = "5" * 64, "0" * 64
FUZZ = {
    "fuzz": "gpu", "seed": 0, "cases": 100, "not_run": 0, "failures": [], "device": "H",
    "specialisations": 9,
}  # fmt: skip
EACH = "of 9 specialisations each"
SOAK = {
    "soak": {"steps": 5000, "tokens": 70000, "compared": 51, "grown_bytes": 1 << 20},
    "failures": [],
}


def of_receipt(**changes):
    given = {
        "sha256": SOURCES, "kernels_sha256": "kernels", "date": "2026-01-02T03:04:05+00:00",
        "devices": ["H, sm_90"], "failed": 0, "figures": {"sum": {"needles": 1234}},
    }  # fmt: skip
    return {**given, **changes}


class Desk:
    """A receipt and records of their own, at a commit."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.receipt = folder, of_receipt()
        self.commits = {SOURCES: "c0ffee"}
        monkeypatch.setattr(scoreboard, "RECORDS", folder / "records.json")
        monkeypatch.setattr(scoreboard, "ACCURACY", folder / "accuracy.json")
        monkeypatch.setattr(scoreboard, "commit_of", lambda sources: self.commits.get(sources))
        monkeypatch.setattr(receipt, "read", lambda: self.receipt)

    def record(self, *runs):
        logs = []
        for i, run in enumerate(runs):
            logs.append(self.folder / f"{i}.log")
            logs[-1].write_text(f"what it says on the way\n{json.dumps(run)}\n")
        scoreboard.record(logs)

    def score(self, words):
        """The one score of which the name has these words. None if it was not measured."""
        (found,) = [score for score in scoreboard.scores() if words in score.what]
        return found if isinstance(found, scoreboard.Score) else None


@pytest.fixture
def desk(tmp_path, monkeypatch):
    return Desk(tmp_path, monkeypatch)


def run_of(kind, sources=SOURCES, device="H", **changes):
    stamp = {"date": "2026-01-03", "sources": sources, "tests": SOURCES, "device": device}
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
    assert desk.score("Needles").commit == f"sources {OTHERS[:10]}"
    desk.commits[OTHERS] = "decaf"
    desk.record()
    assert desk.score("Needles").commit == "decaf"


def test_failed_tests_are_not_passed_over(desk):
    desk.receipt["failed"] = 2
    assert desk.score("Needles").found == "1,234; BUT 2 TESTS FAILED"


def test_what_was_not_measured_is_listed(desk):
    measured = [line for line in scoreboard.table() if line.startswith("| Needles")]
    missing = [line for line in scoreboard.table() if line.startswith("- ")]
    assert len(measured) == 1 and len(missing) == len(scoreboard.ROWS) - 1
    assert not any("Needles" in line for line in missing)
    desk.receipt = None
    assert not any(line.startswith("| Needles") for line in scoreboard.table())


def test_a_run_of_other_sources_says_so(desk):
    desk.commits[OTHERS] = "decaf"
    desk.record(run_of(SOAK, OTHERS))
    score = desk.score("Decode steps")
    assert score.commit == "measured at decaf"
    assert score.found.startswith("5,000 steps of 70,000 tokens, 51 rows compared, 1.0 MiB grown")
    desk.record(run_of(SOAK))
    assert desk.score("Decode steps").commit == "c0ffee"


def test_seeds_of_the_same_sources_add_up(desk):
    failure = {"case": 7}
    desk.record(run_of(FUZZ, not_run=1), run_of(FUZZ, seed=2, failures=[failure]))
    assert desk.score("together, on a GPU").found == f"199 from seeds 0, 2, {EACH}; 1 failure"
    desk.record(run_of(FUZZ, seed=2, cases=40))
    assert desk.score("together, on a GPU").found == f"199 from seeds 0, 2, {EACH}; 1 failure"
    desk.record(run_of(FUZZ, fuzz="host", device="CPU"))
    assert desk.score("together, on a GPU").found.startswith("199")
    assert desk.score("together, of the ref").found == f"100 from seed 0, {EACH}; 0 failures"


@pytest.mark.parametrize("changes", [{"sources": OTHERS}, {"tests": OTHERS}, {"device": "another"}])
def test_runs_of_other_sources_or_devices_do_not_add_up(desk, changes):
    one, two = ({fault: "killed"} for fault in sorted(scoreboard.FAULTS["gpu"])[:2])
    desk.record(run_of(FUZZ), run_of({"mutants": one}), run_of({"sanitizer": {"memcheck": 0}}))
    desk.record(
        run_of(FUZZ, seed=1, **changes),
        run_of({"mutants": two}, **changes),
        run_of({"sanitizer": {"racecheck": 0}}, **changes),
    )
    assert desk.score("together, on a GPU").found == f"100 from seed 1, {EACH}; 0 failures"
    assert desk.score("on a GPU notice").found.startswith(f"1 of {len(scoreboard.FAULTS['gpu'])}, ")
    only_the_second = "memcheck: not run, initcheck: not run, racecheck: 0, synccheck: not run"
    assert desk.score("-sanitizer").found == only_the_second


def test_mutants_and_tools_may_be_run_in_parts(desk):
    faults = sorted(scoreboard.FAULTS["host"])
    killed, last = dict.fromkeys(faults, "killed"), faults[-1]
    first, rest = (dict(list(killed.items())[part]) for part in (slice(9), slice(9, None)))
    desk.record(run_of({"mutants": first | {"of an older catalogue": "killed"}}))
    found = desk.score("on the host notice").found
    assert found == f"9 of {len(faults)}, {len(faults) - 9} not run"
    desk.record(run_of({"mutants": rest | {last: "SURVIVED"}}))
    found = desk.score("on the host notice").found
    assert found == f"{len(faults) - 1} of {len(faults)}, SURVIVED: {last}"
    desk.record(*(run_of({"sanitizer": {tool: 0}}) for tool in sanitize.TOOLS))
    assert desk.score("-sanitizer").found == ", ".join(f"{tool}: 0" for tool in sanitize.TOOLS)


def test_mutants_of_kernels_and_of_the_host_may_be_run_on_two_machines(desk):
    host, gpu = (dict.fromkeys(scoreboard.FAULTS[where], "killed") for where in ("host", "gpu"))
    assert set(host) | set(gpu) == {mutant.fault for mutant in MUTANTS}
    desk.record(run_of({"mutants": host}, device="CPU"), run_of({"mutants": gpu}, device="H"))
    for words, device, faults in ("on the host notice", "CPU", host), ("on a GPU notice", "H", gpu):
        assert desk.score(words).found == f"{len(faults)} of {len(faults)}"
        assert desk.score(words).device == device


def test_figures_of_the_host_stay_until_they_are_counted_again(desk):
    desk.record(figures(OTHERS, wrong_calls=700, pool_operations=10))
    desk.record(figures(pool_operations=11))
    assert desk.score("Wrong calls")[2:4] == ("700", desk.score("block pool").date)
    assert desk.score("Wrong calls").commit == f"measured at sources {OTHERS[:10]}"
    assert desk.score("block pool").found == "11"
    assert desk.score("block pool").commit == "c0ffee"
    desk.record(figures(wrong_calls=701))
    assert len(scoreboard.records()["host"]) == 2
    assert desk.score("Needles").device == "H", "the receipt comes first"


def test_accuracy_is_of_the_kernels_of_the_receipt_or_says_so(desk):
    environment = {
        "date": "2026-01-03T00:00:00+00:00", "device": "H", "commit": "c0ffee" * 6,
        "changed_since_commit": False, "kernels_sha256": "kernels",
    }  # fmt: skip
    rows = [{"kind": "fp8", "error": error, "reference_error": 2.0} for error in (1.0, 3.0)]
    document = {"environment": environment, "rows": rows}
    scoreboard.ACCURACY.write_text(json.dumps(document))
    assert desk.score("Error against")[2:6] == ("fp8: 1.50", "2026-01-03", "c0ffeec0ff", "H")
    desk.receipt["kernels_sha256"] = "others"
    assert desk.score("Error against").commit == "measured at c0ffeec0ff"


def test_different_things_are_counted(desk):
    names = {name: ["1", "2", "3"] for name in ("storages", "block sizes", "group sizes")}
    each = {**names, "head sizes": ["8", "16"]}
    desk.receipt["figures"] = {"sum": {"specialisations": 1200}, "each": each}
    found = desk.score("Dtypes x cache dtypes").found
    assert found.startswith("3 of 27; 2 of 64 head sizes, 3 of 256 block sizes, 3 group sizes")


def test_every_name_that_a_test_counts_by_is_read_by_a_row():
    class Reader(dict):
        def __missing__(self, name):
            return self.setdefault(name, 1)

    reader = Reader()
    for row in scoreboard.ROWS:
        if row.kind == "tests":
            row.found(reader)
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
    ],
)
def test_a_log_without_a_figure_is_refused(desk, text, words):
    (desk.folder / "log").write_text(text)
    with pytest.raises(ValueError, match=words):
        scoreboard.record([desk.folder / "log"])
    assert scoreboard.records() == {}


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
    assert scoreboard.commit_of(OTHERS) is None
    assert scoreboard.commit_of(SOURCES) == head
    write(receipt.RECEIPT.as_posix(), "2")
    assert scoreboard.commit_of(SOURCES) == head
    for name in files[:3]:
        write(name, "2")
        assert scoreboard.commit_of(SOURCES) == f"{head} and changes", name
        git("checkout", name)


def test_the_command_prints_the_table_and_writes_the_page(desk, monkeypatch, capsys):
    monkeypatch.setattr(reliability, "PAGE", desk.folder / "page.md")
    desk.receipt |= {"passed": 1, "skipped": 0}
    (desk.folder / "log").write_text(json.dumps(run_of(SOAK)))
    assert reliability.main([str(desk.folder / "log")]) == 0
    assert "5,000 steps" in capsys.readouterr().out
    assert "5,000 steps" in reliability.PAGE.read_text()
