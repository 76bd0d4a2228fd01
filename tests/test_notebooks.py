"""The example notebooks: what is committed of them, and that they run.

They need the `notebooks` extra, `interop.ipynb` also torch and JAX; without, they are skipped.
`CUPY_PAGED_TEST_NOTEBOOKS=1` makes that a failure. To write their outputs anew, on a CPU:

    jupyter execute --inplace examples/*.ipynb
"""

import ast
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from support.receipt import ROOT

EXAMPLES = ROOT / "examples"
NEEDS = {"tour": ["matplotlib"], "interop": ["torch", "jax"]}
TIMEOUT = 300  # seconds for one cell
MOST_BYTES = 500_000
OF_A_MACHINE = re.compile(r"/(home|opt|root|tmp|usr|work|Users)/|\b0x[0-9a-f]{6,}|site-packages")

every_notebook = pytest.mark.parametrize("name", NEEDS)


def read(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def kinds(cell: dict) -> set[str]:
    """What a cell shows: "stdout", "stderr", "error", and MIME types."""
    found: set[str] = set()
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found.add(output["name"])
        elif output["output_type"] == "error":
            found.add("error")
        else:
            found.update(output["data"])
    return found


def text_of(cell: dict) -> str:
    """All that a cell shows, pictures apart."""
    shown = [
        {k: v for k, v in output.get("data", output).items() if k != "image/png"}
        for output in cell["outputs"]
    ]
    return json.dumps(shown)


def test_there_are_no_others():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NEEDS)


@every_notebook
def test_outputs_are_committed(name):
    cells = code_cells(read(name))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = set().union(*map(kinds, cells))
    assert {"stdout", "text/html"} <= shown and not {"stderr", "error"} & shown
    for cell in cells:
        assert ("plt.show()" in source(cell)) == ("image/png" in kinds(cell)), source(cell)


@every_notebook
def test_outputs_are_of_no_machine_and_small(name):
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for cell in code_cells(read(name)):
        found = OF_A_MACHINE.search(text_of(cell)) or re.search("[Ww]arning", text_of(cell))
        assert not found, f"{found}: {source(cell)}"


@every_notebook
def test_results_are_asserted(name):
    tree = [node for c in code_cells(read(name)) for node in ast.walk(ast.parse(source(c)))]
    assert sum(isinstance(node, ast.Assert) for node in tree) >= 5


@every_notebook
def test_runs(name, tmp_path, monkeypatch):
    needed = ["nbclient", "ipykernel", *NEEDS[name]]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}; the notebooks extra, torch and jax have it"
        if os.environ.get("CUPY_PAGED_TEST_NOTEBOOKS", "") not in ("", "0"):
            pytest.fail(reason)
        pytest.skip(reason)
    executed = execute(name, tmp_path, monkeypatch)
    for before, after in zip(code_cells(read(name)), code_cells(executed), strict=True):
        assert kinds(after) == kinds(before), source(after)
        assert "arning" not in text_of(after)


def execute(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Runs a notebook in a kernel of this Python; a cell that raises, raises here."""
    import nbclient
    import nbformat

    # A kernel that the user has installed under the same name would be another Python's.
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    for variable in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "MPLBACKEND", "PYTHONOPTIMIZE"):
        monkeypatch.delenv(variable, raising=False)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(EXAMPLES)}},
    )
    return client.execute()
