"""A few random cases of every operator on a GPU; `python -m tests.fuzz` runs as many as wanted."""

import pytest

from fuzz import runner, space

CASES = 12  # of each of these specialisations
STEP = 19


@pytest.mark.parametrize("first", range(3, space.NUM_SPECIALISATIONS, STEP))
def test_random_cases(first):
    cases = [(0, first + space.NUM_SPECIALISATIONS * i) for i in range(CASES)]
    failures = [failure for _, failure in runner.run_cases(cases, "gpu") if failure is not None]
    assert not failures, "\n".join(map(str, failures))
