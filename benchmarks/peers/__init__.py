"""Other libraries, each optional: imported only when it is asked for by name.

A peer is a module with

    VARIANTS       the ways to run it that are measured
    ARRANGEMENT    how it wants the cache, see benchmarks.data.reading
    version()      of what is installed; ImportError if it is not, or cannot run here
    prepare(variant, sets, device) -> Prepared; Unsupported for what it does not do
"""

import importlib
from types import ModuleType

MODULES = {
    "flashinfer": "flashinfer_decode",
    "xqa": "xqa",
    "jax": "pallas",
    "sdpa": "sdpa",
}


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.peers.{MODULES[name]}")
