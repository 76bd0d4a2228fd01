"""`python -m cupy_paged info`: what it finds, what it calls missing, and the command it prints."""

import os
import re
import subprocess
import sys

import pytest

from cupy_paged import __main__, __version__, info, requirements
from support.fake_driver import FakeDriver
from support.installation import without
from support.receipt import ROOT

INFO = """
import runpy
sys.argv = ["cupy_paged", "info"]
runpy.run_module("cupy_paged", run_name="__main__")
"""


@pytest.fixture
def driver(monkeypatch):
    return lambda *arguments: FakeDriver(*arguments).install(monkeypatch)


@pytest.fixture
def wheels(monkeypatch):
    """Sets under which names CuPy is installed."""

    def install(*names):
        monkeypatch.setattr(
            requirements, "installed_version", lambda name: "14.2.0" if name in names else None
        )

    return install


def run_info(**variables: str) -> str:
    """The report of a new process in which neither CuPy nor a framework can be imported."""
    names = {"cupy", "cupy_backends", "cuda", "torch", "jax", "ml_dtypes"}
    done = subprocess.run(
        [sys.executable, "-c", without(*names) + INFO],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def missing(report: info.Report) -> dict[str, str]:
    return {problem.what: problem.remedy for problem in report.problems}


def test_report_needs_numpy_alone():
    report = run_info()
    assert f"cupy-paged    {__version__}" in report
    assert re.search(r"^kernels +\S.*\(\d+ files, sha256 [0-9a-f]{12}\)$", report, re.M)
    assert re.search(r"^numpy +\d", report, re.M)
    assert re.search(r'^  missing: CuPy\n    mend:  .*pip install "cupy-cuda1', report, re.M)
    assert "Host arrays run on the NumPy backend." in report


def test_unusable_home_names_the_variable():
    pytest.importorskip("cupy")
    done = subprocess.run(
        [sys.executable, "-m", "cupy_paged", "info"],
        cwd=ROOT,
        env={**os.environ, "HOME": os.devnull, "CUPY_CACHE_DIR": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "a kernel cache that can be written (/dev/null)" in done.stdout
    assert "export CUPY_CACHE_DIR=" in done.stdout
    assert re.search(r"^CuPy +\d", done.stdout, re.M)


def test_devices_are_read_from_the_driver(driver):
    driver(13000, [("NVIDIA H100 80GB HBM3", 9, 0), ("NVIDIA A10", 8, 6)])
    assert info.driver_cuda_version() == "13.0"
    first, second = info.devices()
    assert str(first) == "NVIDIA H100 80GB HBM3, sm_90, 80.0 GiB, 132 SMs"
    assert (second.ordinal, second.compute_capability) == (1, (8, 6))


def test_without_a_driver_there_is_nothing_to_list(monkeypatch):
    monkeypatch.setattr("cupy_paged.driver.cuda_driver", lambda: None)
    assert info.driver_cuda_version() is None
    assert info.devices() == []
    assert "an NVIDIA driver" in missing(info.inspect())


@pytest.mark.parametrize(
    ("driver_arguments", "what"),
    [
        ((12090, [], 100), "a CUDA device"),
        ((12090, []), "a CUDA device"),
        ((12090, [("Tesla V100", 7, 0)]), "a device of sm_75 or newer"),
    ],
    ids=["init-fails", "none", "too-old"],
)
def test_driver_without_a_usable_device(driver, driver_arguments, what):
    driver(*driver_arguments)
    assert what in missing(info.inspect())


@pytest.mark.parametrize(
    ("cuda", "installed", "nvrtc", "what", "remedy"),
    [
        (
            11040, [], None,
            "a driver for CUDA 12 (this one runs CUDA 11.4)",
            r"install a driver for CUDA 12 \(525\.60 or newer, on Windows 528\.33\)",
        ),
        (
            11080, ["cupy-cuda13x"], None,
            "a driver for CUDA 12 and cupy-cuda13x (this one runs CUDA 11.8)",
            r"install a driver for CUDA 13 \(580 or newer\)",
        ),
        (
            12090, ["cupy-cuda13x"], None,
            "a driver for cupy-cuda13x (this one runs CUDA 12.9)",
            r"install a .*, or pip uninstall -y cupy-cuda13x && pip install \"cupy-cuda12x[^&]*",
        ),
        (
            12090, ["cupy-cuda12x", "cupy-cuda13x"], "12.9",
            "a driver for cupy-cuda13x (this one runs CUDA 12.9)",
            r"install a .*, or pip uninstall -y cupy-cuda13x && pip install --force-reinstall .*",
        ),
    ],
    ids=["of no CuPy", "of no CuPy, and 13", "13", "12 and 13"],
)  # fmt: skip
def test_a_driver_that_is_too_old_is_named(
    driver, wheels, monkeypatch, cuda, installed, nvrtc, what, remedy
):
    driver(cuda, [("NVIDIA A10", 8, 6)])
    wheels(*installed)
    monkeypatch.setattr(info, "nvrtc_version", lambda: nvrtc)
    assert re.fullmatch(remedy, missing(info.inspect())[what])


@pytest.mark.parametrize(
    ("cuda", "wheel", "nvrtc"),
    [
        (12000, "cupy-cuda12x", "12.9"),
        (13000, "cupy-cuda12x", "12.9"),
        (13000, "cupy-cuda13x", "13.1"),
        (12000, "cupy", "12.9"),
    ],
)
def test_a_cupy_that_fits_the_driver_stays(driver, wheels, monkeypatch, cuda, wheel, nvrtc):
    driver(cuda, [("NVIDIA A10", 8, 6)])
    wheels(wheel)
    monkeypatch.setattr(info, "nvrtc_version", lambda: nvrtc)
    problems = []
    info._describe_driver(problems)
    assert problems == []


def test_nvrtc_newer_than_the_driver_is_named(driver, wheels, monkeypatch):
    driver(12090, [("NVIDIA A10", 8, 6)])
    wheels("cupy")
    monkeypatch.setattr(info, "nvrtc_version", lambda: "13.0")
    remedy = missing(info.inspect())["a driver for NVRTC 13.0 (this one runs CUDA 12.9)"]
    assert 'pip uninstall -y cupy && pip install "cupy-cuda12x' in remedy


@pytest.mark.parametrize(("cuda", "wrong"), [(12090, "cupy-cuda13x"), (13000, "cupy-cuda12x")])
def test_two_cupy_wheels_are_a_problem(driver, wheels, cuda, wrong):
    driver(cuda, [("NVIDIA A10", 8, 6)])
    wheels("cupy-cuda12x", "cupy-cuda13x")
    found = missing(info.inspect())
    remedy = found["one CuPy: cupy-cuda12x and cupy-cuda13x are installed together"]
    assert remedy.startswith(f"pip uninstall -y {wrong} && pip install --force-reinstall")


def test_part_that_fails_says_so_and_the_rest_goes_on(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken driver")

    monkeypatch.setattr(info, "devices", fail)
    report = info.inspect()
    assert dict(report.rows)["devices"] == "RuntimeError: broken driver"
    assert "numpy" in dict(report.rows)


def test_everything_present_is_ready():
    report = info.Report([("a", "b"), ("longer", "c")], [])
    assert str(report) == "a       b\nlonger  c\n\nGPU kernels: ready."


def test_what_kernels_can_do_without_does_not_make_them_unavailable():
    missing = info.Problem("a cache", "make one", is_fatal=False)
    words = "a  b\n\nGPU kernels: ready.\n  missing: a cache\n    mend:  make one"
    assert str(info.Report([("a", "b")], [missing])) == words
    both = info.Report([("a", "b")], [missing, info.Problem("CuPy", "pip")])
    assert "GPU kernels: not available." in str(both)


@pytest.mark.parametrize(
    ("folder", "mode", "found"),
    [("there", "0", "1 files"), ("file", "0", "none"), ("there", "1", "CUPY_CACHE_IN_MEMORY")],
)
def test_the_kernel_cache_is_described(tmp_path, monkeypatch, folder, mode, found):
    pytest.importorskip("cupy")
    (tmp_path / "there").mkdir()
    for path in tmp_path / "file", tmp_path / "there" / "entry":
        path.write_bytes(b"")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / folder))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", mode)
    problems = []
    assert found in info._describe_cache(problems)
    assert [problem.is_fatal for problem in problems] == [False] * (folder == "file")


def test_a_folder_that_nobody_may_look_into_is_no_cache(monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(info.Path, "is_dir", refuse)
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    problems = []
    assert info._describe_cache(problems) == "none"
    (problem,) = problems
    assert "Permission denied" in problem.what and not problem.is_fatal


def test_no_command_prints_help(capsys):
    assert __main__.main([]) == 0
    assert "info" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--version"])
    assert capsys.readouterr().out == f"cupy-paged {__version__}\n"
