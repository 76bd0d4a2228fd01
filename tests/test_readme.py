"""The README's examples run, and its commands are those that CI calls."""

import re

import pytest

from docs import pages
from support.examples import check_says_what_it_needs, run
from support.receipt import ROOT

README = (ROOT / "README.md").read_text()


EXAMPLES = {
    f"{number}-{re.match('import ([a-z]+)', code)[1]}": code
    for number, code in enumerate(pages.examples(README))
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, monkeypatch):
    defined = run(name, EXAMPLES[name], monkeypatch)
    if "interop.vllm" not in EXAMPLES[name]:  # which installs ops, and calls none
        assert defined["out"].shape == (2, 32, 128)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_says_what_it_needs(name):
    check_says_what_it_needs(EXAMPLES[name])


def test_ci_calls_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    tests, main_job = re.findall(r'^(pip install -e ".*" && \w+) ?.*$', README, re.M)[::-1]
    assert tests in ci
    assert main_job in ci
    assert 'python examples/generate.py "' in README
