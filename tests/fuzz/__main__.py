"""`python -m tests.fuzz`: see runner.py."""

import os
import sys
from pathlib import Path

# JAX would take most of the device's memory for itself, and several processes share it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest finds what tests import

from fuzz.runner import main

if __name__ == "__main__":
    sys.exit(main())
