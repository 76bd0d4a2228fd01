"""Where a test runs: tests/gpu needs CUDA devices, and a full run there writes the receipt."""

import os
import random
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from support import device, receipt
from support.tally import Figures, HostFigures, Tally

# JAX would take most of the device's memory for itself, and several test processes share it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SEED = int(os.environ.get("CUPY_PAGED_TEST_SEED", "0"))

try:
    import hypothesis
except ImportError:
    hypothesis = None
else:
    hypothesis.settings.register_profile("cupy_paged", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("cupy_paged")


def is_gpu_test(path: Path) -> bool:
    return (receipt.ROOT / receipt.GPU_TESTS) in path.parents


@pytest.fixture
def seed(request) -> int:
    """A seed of this test's own: the same on every run, whatever else runs."""
    return zlib.crc32(f"{SEED} {request.node.nodeid}".encode())


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def tally(record_property) -> Tally:
    """Takes what a test has counted, for docs/RELIABILITY.md: see support/tally.py."""
    return Tally(record_property)


@pytest.fixture(autouse=True)
def seed_global_generators(seed) -> None:
    random.seed(seed)
    np.random.seed(seed)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    top = receipt.ROOT / receipt.GPU_TESTS
    if (collection_path == top or is_gpu_test(collection_path)) and device.missing():
        return True
    if collection_path in {receipt.ROOT / path for path in device.left_out()}:
        return True
    return None


def gpu_status() -> list[str]:
    reason = device.missing()
    if reason is None:
        left_out = [f"NOT COLLECTED: {path}: {why}" for path, why in device.left_out().items()]
        return ["GPU tests: collected; a full run writes the receipt", *left_out]
    _, words = receipt.check()
    return [f"GPU TESTS NOT COLLECTED: {reason}", *words.splitlines()]


def pytest_report_header() -> list[str]:
    return [f"seed: {SEED} (CUPY_PAGED_TEST_SEED)", *gpu_status()]


def pytest_configure(config: pytest.Config) -> None:
    is_xdist_worker = hasattr(config, "workerinput")
    if device.missing() is None and os.environ.get("CUPY_PAGED_TEST_POOL") == "off":
        import cupy

        cupy.cuda.set_allocator(None)
    if defined := os.environ.get("CUPY_PAGED_TEST_DEFINE"):
        from cupy_paged import compiler

        plain = compiler.options
        compiler.options = lambda sm=None: (*plain(sm), f"-D{defined}")
    if is_xdist_worker:
        return
    if path := os.environ.get("CUPY_PAGED_FIGURES"):
        config.pluginmanager.register(HostFigures(Path(path)), "cupy_paged_figures")
    if device.missing() is None:
        config.pluginmanager.register(ReceiptWriter(config), "cupy_paged_receipt")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    writer = config.pluginmanager.get_plugin("cupy_paged_receipt")
    terminalreporter.section("GPU", yellow=writer is None)
    for line in gpu_status() if writer is None else [writer.result]:
        terminalreporter.write_line(line)


class ReceiptWriter:
    """Watches one session and, where it ran all of tests/gpu, writes the receipt."""

    def __init__(self, config: pytest.Config):
        self.path = Path(
            os.environ.get("CUPY_PAGED_RECEIPT") or receipt.ROOT / receipt.RECEIPT
        ).absolute()
        self.start = time.monotonic()
        self.sha256 = receipt.digest()
        self.files: set[Path] = set()
        self.items: set[str] = set()
        self.deselected = 0
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.figures = Figures()
        self.selected_by_id = any("::" in argument for argument in config.args)
        # What workers of pytest-xdist deselect is not seen here.
        filters = ("keyword", "markexpr", "deselect", "lf")
        self.is_filtered = any(config.getoption(name, None) for name in filters)
        self.result = "GPU receipt: not written"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        gpu_items = [item for item in session.items if is_gpu_test(item.path)]
        self.files = {item.path for item in gpu_items}
        self.items = {item.nodeid for item in gpu_items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.items = {name for name in ids if is_gpu_test(receipt.ROOT / name.partition("::")[0])}
        self.files = {receipt.ROOT / name.partition("::")[0] for name in self.items}

    def pytest_deselected(self, items) -> None:
        self.deselected += sum(is_gpu_test(item.path) for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self.items:
            return
        self.figures.add(report)
        if report.failed:
            self.outcomes[report.nodeid] = ("failed", "")
        elif report.skipped:
            if hasattr(report, "wasxfail"):
                reason = f"expected failure: {report.wasxfail}"
            else:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.outcomes.setdefault(report.nodeid, ("skipped", reason))
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, ("passed", ""))

    def why_partial(self) -> str | None:
        """What kept this session from being a full run of tests/gpu. None if it was one."""
        left_out = {receipt.ROOT / path for path in device.left_out()}
        missing = receipt.missing_test_files(self.files | left_out)
        if self.selected_by_id:
            return "single tests were named"
        if missing:
            return f"not collected: {', '.join(missing)}"
        if self.deselected:
            return f"{self.deselected} GPU tests were deselected"
        if len(self.outcomes) != len(self.items):
            return f"{len(self.items) - len(self.outcomes)} GPU tests did not run"
        if not self.items:
            return "there are no GPU tests"
        if self.is_filtered:
            return "the run was filtered"
        if changes := receipt.has_other_kernels():
            return f"{' and '.join(changes)} had other kernels compiled"
        if receipt.digest() != self.sha256:
            return "the sources changed during the run"
        return None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        reason = self.why_partial()
        if reason is not None:
            self.result = f"GPU receipt: not written: {reason}"
            return
        written = receipt.compose(
            self.outcomes,
            sha256=self.sha256,
            environment={**receipt.describe_environment(), "left_out": device.left_out()},
            duration=time.monotonic() - self.start,
            figures=self.figures.totals(),
        )
        receipt.write(written, self.path)
        self.result = f"GPU receipt: {receipt.summary(written)}: written to {self.path}"
