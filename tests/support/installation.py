"""What an installation brings, and one that lacks some of it."""

import sys

from support.receipt import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

EXTRAS: dict[str, list[str]] = _PROJECT["optional-dependencies"]


def without(*modules: str) -> str:
    """Code after which these modules, and what is in them, cannot be imported."""
    return f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
