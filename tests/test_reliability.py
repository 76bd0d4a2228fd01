"""The page of hazards is as the command makes it, and names tests that there are."""

import pytest

import reliability
from support.receipt import ROOT


@pytest.mark.parametrize("hazard", reliability.HAZARDS, ids=lambda hazard: hazard.name)
def test_the_tests_of_a_hazard_are_there(hazard):
    for test in hazard.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in text if name else "def test_" in text or "class Test" in text


def test_the_page_is_as_the_command_makes_it():
    written = reliability.PAGE.read_text(encoding="utf-8")
    assert written == reliability.page(), "run `python tests/reliability.py`, also for a receipt"
