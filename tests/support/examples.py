"""Examples in Markdown, run as a reader would run them: each as a module of its own."""

import importlib.util
import re
import sys
import types
from typing import Any

import pytest

from support import device
from support.frameworks import REQUIRED

FRAMEWORKS = {
    "torch": "torch", "jax": "jax", "transformers": "transformers", "numba": "numba",
    "cuda": "cuda.core",
}  # fmt: skip
"""By the package that an example imports: the module that must be there."""
NEEDS_A_GPU = r"cp\.cuda\.|torch\.cuda\.(?!is_avail)|import numba|from cuda"


def is_module(name: str) -> bool:
    """Whether a module is there, its packages too."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def imported(code: str) -> set[str]:
    """The packages that an example imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.M))


def check_says_what_it_needs(code: str) -> None:
    """A line that fails without a GPU says so, and that NumPy does where it does."""
    needs_a_gpu = bool(re.search(NEEDS_A_GPU, code))
    takes_numpy = "import cupy as cp" in code and not needs_a_gpu
    assert code.count("  # needs a GPU\n") == needs_a_gpu
    assert code.count("  # needs a GPU; without one, import numpy as cp\n") == takes_numpy


def runnable(code: str) -> str:
    """The example as it runs here. Without a GPU, NumPy stands in for CuPy.

    Skips one whose framework is not installed, or that needs a GPU's streams where there are none.
    """
    for name, framework in FRAMEWORKS.items():
        if name in imported(code) and framework not in REQUIRED and not is_module(framework):
            pytest.skip(f"{framework} is not installed: pip install {framework}")
    if (reason := device.missing()) and re.search(NEEDS_A_GPU, code):
        pytest.skip(f"needs a GPU, or its streams: {reason}")
    if reason:
        return code.replace("import cupy as cp  ", "import numpy as cp  ")
    return code


def run(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example defines."""
    # torch.compile looks for the globals of a function where its module's name leads.
    module = types.ModuleType(f"example_{name}".replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(runnable(code), name, "exec"), module.__dict__)
    return module.__dict__
