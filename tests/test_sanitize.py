"""What is said of compute-sanitizer's findings, with a stand-in for it."""

import json
import os
import re
import subprocess
import sys

import pytest

import sanitize
import share


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command with a sanitizer that says and returns what it is told to.

    planted    what it says of the fault that was planted for it
    """

    def run(said, status, planted="RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"):
        fake = tmp_path / "compute-sanitizer"
        fake.write_text(
            f"""#!/bin/sh
case "$*" in
*planted_faults.py::test_a_fault\\[racecheck\\]*) echo "========= {planted}"; exit 1;;
esac
cat <<END
{said}
END
exit {status}
"""
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(sys, "argv", ["sanitize.py", "racecheck"])
        status = sanitize.main()
        return status, capsys.readouterr().out.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("said", "status", "found"),
    [
        ("ERROR SUMMARY: 0 errors", 0, 0),
        ("ERROR SUMMARY: 0 errors\n5 passed, 30 deselected in 9.53s", 0, 0),
        ("ERROR SUMMARY: 1 error", 1, 1),
        ("RACECHECK SUMMARY: 64 hazards displayed (64 errors, 0 warnings)", 1, 64),
        ("ERROR SUMMARY: 2 errors\nERROR SUMMARY: 3 errors", 1, 5),
    ],
)
def test_findings_are_counted(run, said, status, found):
    returned, last = run(f"7 passed, 2 deselected in 61.20s (0:01:01)\n========= {said}", status)
    assert returned == status
    tests = 12 if "5 passed" in said else 7
    assert json.loads(last)["sanitizer"] == {"racecheck": {"findings": found, "tests": tests}}


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("", 1),
        ("7 passed in 2.00s", 0),
        ("SUMMARY: 0 errors", 1),
        ("SUMMARY: 0 errors", 0),
        ("SUMMARY: 0 errors\n7 skipped in 0.10s", 0),
        ("SUMMARY: 0 errors\n7 passed, 1 skipped, 2 deselected in 2.00s", 0),
        ("SUMMARY: 0 errors\n1 failed, 7 passed in 2.00s", 1),
    ],
)
def test_tests_that_did_not_run_or_failed_are_no_clean_bill(run, said, status):
    returned, last = run(said, status)
    assert returned == 1
    assert "says nothing about all tests" in last


@pytest.mark.parametrize("planted", ["", "RACECHECK SUMMARY: 0 hazards displayed"])
def test_a_tool_that_is_blind_is_not_believed(run, planted):
    returned, last = run("========= ERROR SUMMARY: 0 errors", 0, planted)
    assert returned == 1
    assert last == "racecheck has not found the fault that was planted for it"


def test_what_shares_have_found_is_added_up(monkeypatch, capsys):
    shares = []

    def run(tool, tests, share="0/1"):
        if sanitize.PLANTED in tests[0]:
            return sanitize.Result(1, 1)
        shares.append(share)
        found = {"0/3": 2, "1/3": 0, "2/3": 5}[share]
        return sanitize.Result(found, int(found > 0), passed=4)

    monkeypatch.setattr(sanitize, "run", run)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "memcheck", "--workers", "3"])
    assert sanitize.main() == 1
    assert json.loads(capsys.readouterr().out)["sanitizer"] == {
        "memcheck": {"findings": 7, "tests": 12}
    }
    assert sorted(shares) == ["0/3", "1/3", "2/3"]


def test_shares_are_all_tests_once(tmp_path):
    """Also of those that `-k` leaves, which may be every other one."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n"
        "names = [f'{kind}{i}' for i in range(10) for kind in ('odd', 'even')]\n"
        "@pytest.mark.parametrize('name', names)\n"
        "def test(name):\n"
        "    print(f'<{name}>')\n"
    )
    pytest_of_its_own = [sys.executable, "-m", "pytest", "-p", "share", "-k", "even", "-s", file]
    ran = []
    for i in range(4):
        environment = {share.VARIABLE: f"{i}/4", "PYTHONPATH": str(sanitize.TESTS)}
        said = subprocess.check_output(
            pytest_of_its_own, env=os.environ | environment, cwd=tmp_path, text=True
        )
        names = re.findall("<(.*?)>", said)
        assert len(names) in (2, 3)
        ran += names
    assert sorted(ran) == [f"even{i}" for i in range(10)]


def test_a_tool_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "leakcheck"])
    with pytest.raises(SystemExit, match="2"):
        sanitize.main()
    assert "choose from" in capsys.readouterr().err
