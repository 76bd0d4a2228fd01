"""Examples in Markdown, run as a reader would run them: each as a module of its own."""

import importlib.util
import re
import sys
import types
from typing import Any

import pytest

from support import device
from support.frameworks import REQUIRED


def imported(code: str) -> set[str]:
    """The packages that an example imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.M))


def runnable(code: str) -> str:
    """The example as it runs here. Without a GPU, NumPy stands in for CuPy.

    Skips one whose framework is not installed, or that needs a GPU's streams where there are none.
    """
    for framework in sorted(imported(code) & {"torch", "jax"}):
        if framework not in REQUIRED and importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    if (reason := device.missing()) and re.search(r"cp\.cuda\.|torch\.cuda\.(?!is_avail)", code):
        pytest.skip(f"needs streams of a GPU: {reason}")
    if reason:
        return code.replace("import cupy as cp\n", "import numpy as cp\n")
    return code


def run(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example defines."""
    # torch.compile looks for the globals of a function where its module's name leads.
    module = types.ModuleType(f"example_{name}".replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(runnable(code), name, "exec"), module.__dict__)
    return module.__dict__
