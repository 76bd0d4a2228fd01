"""The page of hazards is as the command makes it, and names tests that there are."""

import pytest

import reliability
from hazards import SECTIONS
from scoreboard import rows, table
from support.receipt import ROOT

HAZARDS = [hazard for section in SECTIONS.values() for hazard in section]


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda hazard: hazard.name)
def test_the_tests_of_a_hazard_are_there(hazard):
    assert hazard.tests
    for test in hazard.tests:
        check_that_it_is_there(test)


def check_that_it_is_there(test):
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.what)
def test_a_figure_says_what_counts_it(row):
    assert isinstance(row.how, tuple) == (row.kind == "tests")
    for test in row.how if row.kind == "tests" else ():
        check_that_it_is_there(test)


def test_every_target_is_met():
    assert table.unmet() == []


def test_no_two_hazards_are_alike():
    assert len({hazard.name for hazard in HAZARDS}) == len(HAZARDS)
    assert all(len(set(hazard.tests)) == len(hazard.tests) for hazard in HAZARDS)


def test_the_page_is_as_the_command_makes_it():
    written = reliability.PAGE.read_text(encoding="utf-8")
    assert written == reliability.page(), "run `python tests/reliability.py`, also for a receipt"
