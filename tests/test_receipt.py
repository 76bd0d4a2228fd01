"""When a session writes the GPU receipt and figures, and what must be in them.

The sessions run in a small tree of their own, with this conftest and a stand-in for CuPy.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import receipt

DEVICE = """
class runtime:
    getDeviceCount = staticmethod(lambda: {count})
"""
DRIVER = """
devices = lambda: ["stand-in"]
driver_version = driver_cuda_version = lambda: "1.0"
"""
INFO = """
nvrtc_version = lambda: "1.0"
framework_versions = lambda: {"numpy": "2.0"}
"""
GPU_TESTS = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_sum(n):
    assert n + n == 2 * n

def test_seeded(rng):
    assert 0 <= rng.random() < 1
"""


class Tree:
    """A repository with two files of GPU tests, and sessions in it."""

    def __init__(self, root: Path):
        self.root = root
        for name in (
            "conftest",
            "support/__init__",
            "support/device",
            "support/receipt",
            "support/tally",
        ):
            self.write(f"tests/{name}.py", (receipt.ROOT / f"tests/{name}.py").read_text())
        shutil.copy(receipt.ROOT / "pyproject.toml", root)
        self.write("cupy_paged/__init__.py", "")
        self.write("cupy_paged/driver.py", DRIVER)
        self.write("cupy_paged/info.py", INFO)
        self.write("cupy_paged/compiler.py", "sources_digest = lambda: 'kernels'\n")
        self.write("kernels/one.cu", "// one\n")
        self.write("tests/gpu/test_one.py", GPU_TESTS)
        self.write("tests/gpu/deeper/test_two.py", "def test_two(): pass\n")
        self.write("tests/test_host.py", "def test_host(): pass\n")
        self.write("stand_in/cupy/__init__.py", "from cupy import cuda\n")
        self.set_device_count(1)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def set_device_count(self, count: int) -> None:
        self.write("stand_in/cupy/cuda.py", DEVICE.format(count=count))

    def pytest(self, *arguments: str, **variables: str) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root / "stand_in"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_ADDOPTS": "",
            "CUPY_PAGED_FIGURES": "",
            **variables,
        }
        if "CUPY_PAGED_RECEIPT" not in variables:
            environment.pop("CUPY_PAGED_RECEIPT", None)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout + done.stderr

    def receipt(self) -> dict | None:
        return receipt.read(self.root)


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def test_tests_for_two_devices_are_left_out_with_one_and_the_header_and_receipt_say_so(tree):
    path = "tests/gpu/test_devices.py"
    tree.write(path, "def test_both(): pass\n")
    output = tree.pytest()
    assert f"NOT COLLECTED: {path}: CuPy sees 1 of 2 CUDA devices" in output
    assert "4 passed, 0 failed, 0 skipped on stand-in" in output
    assert list(tree.receipt()["left_out"]) == [path]
    assert f"without {path}" in receipt.check(tree.root)[1]
    tree.set_device_count(2)
    assert "NOT COLLECTED" not in tree.pytest()
    assert tree.receipt()["collected"] == 5
    assert tree.receipt()["left_out"] == {}
    assert "without" not in receipt.check(tree.root)[1]


def test_full_run_writes_a_receipt_that_vouches_for_the_tree(tree):
    output = tree.pytest()
    assert "GPU receipt: 4 passed, 0 failed, 0 skipped on stand-in" in output
    written = tree.receipt()
    assert written["sha256"] == receipt.digest(tree.root)
    assert written["devices"] == ["stand-in"]
    assert [written[key] for key in ("collected", *receipt.OUTCOMES)] == [4, 4, 0, 0]
    assert receipt.check(tree.root)[0]


def test_naming_the_folder_is_a_full_run_and_the_receipt_can_go_elsewhere(tree, tmp_path):
    elsewhere = tmp_path / "out" / "receipt.json"
    tree.pytest("tests/gpu", CUPY_PAGED_RECEIPT=str(elsewhere))
    assert tree.receipt() is None
    assert json.loads(elsewhere.read_text())["passed"] == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-k", "two or host"], "not collected: tests/gpu/test_one.py"),
        (["-k", "not seeded"], "1 GPU tests were deselected"),
        (["tests/gpu/test_one.py"], "not collected: tests/gpu/deeper/test_two.py"),
        (
            ["tests/gpu/test_one.py::test_seeded", "tests/gpu/deeper/test_two.py"],
            "single tests were named",
        ),
        (["--ignore=tests/gpu/deeper"], "not collected: tests/gpu/deeper/test_two.py"),
        (["--collect-only"], "4 GPU tests did not run"),
    ],
    ids=["k-file", "k-test", "file", "id", "ignore", "collect-only"],
)
def test_partial_run_writes_nothing(tree, arguments, reason):
    assert f"GPU receipt: not written: {reason}" in tree.pytest(*arguments)
    assert tree.receipt() is None


def test_stopped_run_writes_nothing(tree):
    tree.write("tests/gpu/deeper/test_two.py", "def test_two(): assert False\n")
    assert "GPU receipt: not written: 3 GPU tests did not run" in tree.pytest("-x")
    assert tree.receipt() is None


def test_file_that_cannot_be_collected_writes_nothing(tree):
    tree.write("tests/gpu/deeper/test_two.py", "import no_such_module\n")
    assert "GPU receipt: not written" in tree.pytest("--continue-on-collection-errors")
    assert tree.receipt() is None


def test_sources_that_change_during_the_run_write_nothing(tree):
    tree.write(
        "tests/gpu/deeper/test_two.py",
        "def test_two(): open('kernels/one.cu', 'a').write('// more')\n",
    )
    assert "not written: the sources changed during the run" in tree.pytest()
    assert tree.receipt() is None


def test_a_run_of_other_kernels_writes_nothing(tree, monkeypatch):
    monkeypatch.setenv("CUPY_PAGED_EMULATE_SM", "75")
    assert "not written: CUPY_PAGED_EMULATE_SM had other kernels compiled" in tree.pytest()
    assert tree.receipt() is None


def test_failures_errors_and_skips_are_recorded_and_refused(tree):
    tree.write(
        "tests/gpu/deeper/test_two.py",
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError\n"
        "@pytest.fixture\n"
        "def leaky():\n"
        "    yield\n"
        "    raise RuntimeError\n"
        "def test_fails(): assert False\n"
        "def test_errors(broken): pass\n"
        "def test_leaks(leaky): pass\n"
        "def test_skips(): pytest.skip('no second device')\n"
        "@pytest.mark.xfail\n"
        "def test_is_expected_to_fail(): assert False\n",
    )
    tree.pytest()
    written = tree.receipt()
    two = "tests/gpu/deeper/test_two.py::"
    assert [written[key] for key in ("collected", *receipt.OUTCOMES)] == [8, 3, 3, 2]
    assert written["failures"] == [two + "test_errors", two + "test_fails", two + "test_leaks"]
    assert list(written["skips"]) == [two + "test_is_expected_to_fail", two + "test_skips"]
    assert "no second device" in written["skips"][two + "test_skips"]
    vouches, words = receipt.check(tree.root)
    assert not vouches
    assert "3 GPU tests failed" in words
    assert f"unexpected skip: {two}test_skips" in words


TALLIES = """
import pytest

@pytest.mark.parametrize("n", [1, 20, 3])
def test_passes(n, tally):
    tally("tried", n)
    tally.most("largest", n)
    tally.each("numbers", n)
    tally.each("numbers", 100)

def test_fails(tally):
    tally("tried", 1000)
    assert False

@pytest.fixture
def leaky():
    yield
    raise RuntimeError

def test_leaks(tally, leaky):
    tally.most("largest", 1000)

def test_skips(tally):
    tally.each("numbers", 1000)
    pytest.skip("after all")
"""
TALLIED = {
    "sum": {"tried": 24},
    "most": {"largest": 20},
    "each": {"numbers": ["1", "3", "20", "100"]},
}
WITHOUT_AND_WITH_WORKERS = pytest.mark.parametrize(
    "workers",
    [
        [],
        pytest.param(
            ["-n2"],
            marks=pytest.mark.skipif(not find_spec("xdist"), reason="needs pytest-xdist"),
        ),
    ],
    ids=["alone", "xdist"],
)


@WITHOUT_AND_WITH_WORKERS
def test_the_receipt_has_what_tests_that_passed_have_counted(tree, workers):
    tree.write("tests/gpu/deeper/test_two.py", TALLIES)
    tree.write("tests/test_host.py", TALLIES)
    tree.pytest(*workers)
    assert tree.receipt()["figures"] == TALLIED
    assert tree.receipt()["failed"] == 2


@WITHOUT_AND_WITH_WORKERS
@pytest.mark.parametrize("num_devices", [0, 1])
def test_what_tests_on_the_host_count_goes_where_it_is_asked_for(tree, workers, num_devices):
    tree.set_device_count(num_devices)
    tree.write("tests/gpu/deeper/test_two.py", TALLIES)
    tree.write("tests/test_host.py", TALLIES)
    output = tree.pytest(*workers, CUPY_PAGED_FIGURES="out/figures.json")
    assert f"figures: written to {tree.root}/out/figures.json" in output
    (line,) = (tree.root / "out/figures.json").read_text().splitlines()
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", said.pop("date"))
    assert said == {
        "figures": TALLIED,
        "failed": 2,
        "device": "CPU",
        "other_kernels": [],
        "versions": {"numpy": "2.0"},
        "sources": receipt.digest(tree.root),
        "tests": receipt.digest(tree.root, ["tests"]),
    }


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("raise KeyboardInterrupt", "the run was stopped"),
        ("open('kernels/one.cu', 'a').write('// more')", "the sources changed during the run"),
    ],
)
def test_no_figures_of_a_run_that_was_none(tree, test, reason):
    tree.write("tests/test_host.py", f"def test_host(): {test}\n")
    output = tree.pytest("tests/test_host.py", CUPY_PAGED_FIGURES="figures.json")
    assert f"figures: not written: {reason}" in output
    assert not (tree.root / "figures.json").exists()


def test_without_a_device_gpu_tests_are_not_collected_and_the_header_says_so(tree):
    tree.pytest()
    tree.set_device_count(0)
    output = tree.pytest()
    assert "GPU TESTS NOT COLLECTED: CuPy sees no CUDA device" in output
    assert "GPU receipt: matches this tree: 4 passed, 0 failed, 0 skipped on stand-in" in output
    assert "1 passed" in output
    assert "skipped" not in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kernels/one.cu", True),
        ("kernels/two.cuh", True),
        ("cupy_paged/info.py", True),
        ("tests/gpu/test_one.py", True),
        ("tests/conftest.py", True),
        ("tests/support/data.py", True),
        ("tests/test_host.py", False),
        ("cupy_paged/__pycache__/info.cpython-311.pyc", False),
        ("kernels/notes.md", False),
        ("README.md", False),
    ],
)
def test_digest_covers_the_kernels_the_package_and_the_gpu_tests(tree, name, changes):
    before = receipt.digest(tree.root)
    tree.write(name, "# changed\n")
    assert (receipt.digest(tree.root) != before) == changes


def test_digest_tells_where_one_file_ends(tree):
    tree.write("kernels/a.cu", "first")
    before = receipt.digest(tree.root)
    tree.write("kernels/a.cu", "")
    tree.write("kernels/b.cu", "first")
    assert receipt.digest(tree.root) != before


def vouching(tree: Tree, **changes: object) -> dict:
    sha256 = receipt.digest(tree.root)
    good = receipt.compose(
        {"tests/gpu/test_one.py::test_seeded": ("passed", "")},
        sha256=sha256,
        environment={"devices": ["stand-in"]},
        duration=1.0,
        figures={},
    )
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sha256": "0" * 64}, "other sources"),
        ({"failed": 1, "passed": 0, "failures": ["test_one"]}, "1 GPU tests failed: test_one"),
        ({"passed": 0, "collected": 0}, "no GPU test passed"),
        ({"collected": 2}, "do not add up to 2"),
        ({"skipped": 1, "collected": 2, "skips": {"test_a": "why"}}, "unexpected skip: test_a"),
    ],
    ids=["sources", "failure", "empty", "count", "skip"],
)
def test_receipt_that_does_not_vouch_is_refused(tree, changes, problem):
    assert receipt.problems(vouching(tree), receipt.digest(tree.root)) == []
    receipt.write(vouching(tree, **changes), tree.root / receipt.RECEIPT)
    vouches, words = receipt.check(tree.root)
    assert not vouches
    assert problem in words


def test_expected_skip_is_accepted(tree, monkeypatch):
    monkeypatch.setitem(receipt.EXPECTED_SKIPS, "tests/gpu/test_one.py::", "one device")
    skipped = vouching(tree, skipped=1, collected=2, skips={"tests/gpu/test_one.py::test_a": ""})
    assert receipt.problems(skipped, receipt.digest(tree.root)) == []


def test_pending_file_passes_with_a_loud_warning(tree):
    assert not receipt.check(tree.root)[0]
    tree.write("tests/GPU_PENDING", "no GPU was free\n")
    vouches, words = receipt.check(tree.root)
    assert vouches
    assert "WARNING" in words
    assert "no GPU was free" in words
    assert "there is no tests/gpu_receipt.json" in words


@pytest.mark.parametrize("text", ["", "one\ntwo\n"])
def test_pending_file_needs_one_line(tree, text):
    tree.write("tests/GPU_PENDING", text)
    with pytest.raises(ValueError, match="needs one that gives the reason"):
        receipt.check(tree.root)


def test_command_reports_by_its_exit_status(tree):
    command = [sys.executable, "tests/support/receipt.py"]
    assert subprocess.run(command, cwd=tree.root, capture_output=True).returncode == 1
    receipt.write(vouching(tree), tree.root / receipt.RECEIPT)
    assert subprocess.run(command, cwd=tree.root, capture_output=True).returncode == 0
