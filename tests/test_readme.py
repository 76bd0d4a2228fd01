"""The README's examples run, and its commands are those that CI calls."""

import importlib.util
import re

import pytest

from support import device
from support.frameworks import REQUIRED
from support.receipt import ROOT

README = (ROOT / "README.md").read_text()


def examples() -> dict[str, str]:
    """Name -> example. Without a GPU, CuPy's run on NumPy, whose names it shares, streams apart."""
    found = {}
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)):
        framework = re.match(r"import (\w+)", code)[1]
        if "cp.cuda." in code and device.missing():
            continue
        if framework == "cupy":
            stand_in = "numpy" if device.missing() else "cupy"
            found[f"{number}-cupy"] = code.replace(
                "import cupy as cp\n", f"import {stand_in} as cp\n"
            )
        elif framework in REQUIRED or importlib.util.find_spec(framework):
            found[f"{number}-{framework}"] = code
    return found


@pytest.mark.parametrize("name", examples())
def test_example_runs(name):
    namespace: dict[str, object] = {}
    code = examples()[name]
    exec(code, namespace)
    if "interop.vllm" not in code:  # which installs ops, and calls none
        assert namespace["out"].shape == (2, 32, 128)


def test_ci_calls_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    tests, main_job = re.findall(r'^(pip install -e ".*" && \w+) ?.*$', README, re.M)[::-1]
    assert tests in ci
    assert main_job in ci
    assert 'python examples/generate.py "' in README
