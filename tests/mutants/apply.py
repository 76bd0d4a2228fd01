"""Puts a mutant's text in the place of the source that a process of tests imports or compiles.

A plugin of pytest, which the runner names on the command line.
"""

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from mutants.mutant import ROOT, Mutant

VARIABLE = "CUPY_PAGED_TEST_MUTANT"
"""Holds the fields of a mutant, as a JSON list."""


def pytest_load_initial_conftests() -> None:
    """Applies the mutant of the environment, before anything of the package is imported."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "cupy_paged"]
    assert not loaded, f"{VARIABLE} comes too late, imported already: {loaded}"
    mutant = Mutant(*json.loads(os.environ[VARIABLE]))
    if mutant.file.startswith("kernels/"):
        _change_kernel(mutant)
    else:
        sys.meta_path.insert(0, _Finder(mutant))


def _change_kernel(mutant: Mutant) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cupy-paged-mutant-")) / "kernels"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(ROOT / "kernels", folder)
    (folder.parent / mutant.file).write_text(mutant.text(), encoding="utf-8")

    from cupy_paged import compiler

    compiler.kernel_dir = lambda: folder


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a text that is not the file's, past the cache of what was compiled before."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str):
        return self.source_to_code(self._text, self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._path = ROOT / mutant.file
        self._name = mutant.file.removesuffix(".py").replace("/", ".")
        self._text = mutant.text()

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._name:
            return None
        loader = _Loader(fullname, str(self._path), self._text)
        return importlib.util.spec_from_file_location(fullname, self._path, loader=loader)
