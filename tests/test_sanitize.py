"""What is said of compute-sanitizer's findings, with a stand-in for it."""

import json
import sys

import pytest
import sanitize


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command with a sanitizer that says and returns what it is told to."""

    def run(said, status):
        fake = tmp_path / "compute-sanitizer"
        fake.write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\nexit {status}\n")
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
        ("ERROR SUMMARY: 1 error", 1, 1),
        ("RACECHECK SUMMARY: 64 hazards displayed (64 errors, 0 warnings)", 1, 64),
        ("ERROR SUMMARY: 2 errors\nERROR SUMMARY: 3 errors", 1, 5),
    ],
)
def test_findings_are_counted(run, said, status, found):
    returned, last = run(f"========= {said}", status)
    assert returned == status
    assert json.loads(last)["sanitizer"] == {"racecheck": found}


@pytest.mark.parametrize("said", ["", "========= ERROR SUMMARY: 0 errors"])
def test_tests_that_failed_are_no_clean_bill(run, said):
    returned, last = run(said, 1)
    assert returned == 1
    assert "says nothing about all tests" in last


def test_a_tool_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "leakcheck"])
    with pytest.raises(SystemExit, match="2"):
        sanitize.main()
    assert "choose from" in capsys.readouterr().err
