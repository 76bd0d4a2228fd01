"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import cupy_paged

ROOT = Path(cupy_paged.__path__[0])
FILES = [path for path in ROOT.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in sorted(FILES)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
