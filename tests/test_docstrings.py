"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import cupy_paged

MODULES = [module.name for module in pkgutil.iter_modules(cupy_paged.__path__)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"cupy_paged.{name}")).failed == 0
