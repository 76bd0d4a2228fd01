"""What brings a machine what GPU arrays need: for which CUDA, in the place of what, by which words.

Drivers, CuPy under its names and builds of torch are stand-ins.
"""

import importlib.metadata
import shlex

import pytest

from cupy_paged import requirements
from support.fake_driver import FakeDriver
from support.installation import EXTRAS
from support.receipt import ROOT


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the driver's CUDA version, what torch's build says of CUDA, and the CuPy wheels."""

    def set_up(driver=None, torch=None, wheels=()):
        found = driver and FakeDriver(driver)
        monkeypatch.setattr("cupy_paged.driver.cuda_driver", lambda: found)
        info = tmp_path / "torch-2.11.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
        if torch is not None:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch" / "version.py").write_text(torch)
        monkeypatch.setattr(
            importlib.metadata,
            "distribution",
            lambda name: importlib.metadata.PathDistribution(info),
        )
        monkeypatch.setattr(
            requirements, "installed_version", lambda name: "14.2.0" if name in wheels else None
        )

    return set_up


def steps(command):
    """The words of each command in a chain of them."""
    return [shlex.split(step) for step in command.split(" && ")]


# ---- versions ----


def test_the_oldest_cupy_is_the_one_that_pip_is_told():
    wheels = {major: wheel for wheel, major in requirements.CUPY_WHEELS.items()}
    assert {
        major: f"{wheels[major]}>={requirements.OLDEST_CUPY}" for major in requirements.REQUIREMENTS
    } == {major: needed[0] for major, needed in requirements.REQUIREMENTS.items()}


@pytest.mark.parametrize(
    ("version", "is_too_old"),
    [
        ("14.1.9", True),
        ("9.6.0", True),
        ("14", True),
        ("14.1.post1", True),
        ("14.2a1", True),
        ("14.2rc1", True),
        ("14.2.0b2", True),
        ("14.2.0-RC.1", True),
        ("14.2.dev0+g1234567", True),
        ("14.2rc1.post1", True),
        ("14.2", False),
        ("14.2.0", False),
        ("v14.2", False),
        ("14.2+cu130", False),
        ("14.2.post1", False),
        ("14.2.post1.dev2", False),
        ("14.2.1rc1", False),
        ("14.10.0rc1", False),
        ("15", False),
        ("15.0.dev1", False),
    ],
)
def test_versions_of_cupy_are_compared_as_pip_does(version, is_too_old):
    assert requirements.is_too_old(version) == is_too_old


# ---- commands ----


@pytest.mark.parametrize(("major", "driver"), [(12, 12000), (13, 13000)])
def test_the_command_names_what_the_extra_installs(machine, major, driver):
    machine(driver)
    assert steps(requirements.install_command()) == [["pip", "install", *EXTRAS[f"cuda{major}"]]]


def test_a_command_is_quoted_for_every_shell(machine):
    """In cmd.exe, single quotes are letters, and what follows a bare > names a file."""
    machine(12090, wheels=["cupy-cuda12x", "cupy-cuda13x"])
    command = requirements.install_command()
    assert "'" not in command
    quoted = command.split('"')[1::2]
    assert [word for words in steps(command) for word in words if ">" in word] == [
        words for words in quoted if ">" in words
    ]


NO_CUDA = "cuda = None\n"
CUDA_12 = "cuda = '12.8'\n"
CUDA_13 = "from typing import Optional\ncuda: Optional[str] = '13.0'\n"
TORCHES = (NO_CUDA, CUDA_12, CUDA_13)

FITTING = [
    # The driver, the CuPy wheels, and the major to install where torch is for no CUDA, 12 and 13.
    (None, (), (12, 12, 13)),
    (None, (12,), (12, 12, 12)),
    (None, (13,), (13, 13, 13)),
    (None, (12, 13), (12, 12, 13)),
    (11040, (), (12, 12, 12)),
    (11040, (11,), (12, 12, 12)),
    (11040, (12,), (12, 12, 12)),
    (11040, (13,), (13, 13, 13)),
    (11040, (12, 13), (12, 12, 12)),
    (12020, (), (12, 12, 12)),
    (12020, (11,), (12, 12, 12)),
    (12020, (12,), (12, 12, 12)),
    (12020, (13,), (12, 12, 12)),
    (12020, (12, 13), (12, 12, 12)),
    (13000, (), (13, 13, 13)),
    (13000, (12,), (12, 12, 12)),
    (13000, (13,), (13, 13, 13)),
    (13000, (12, 13), (13, 13, 13)),
    (13000, (11, 12), (12, 12, 12)),
    (14000, (), (13, 13, 13)),
]


@pytest.mark.parametrize(
    ("driver", "wheels", "torch", "major"),
    [
        (driver, wheels, torch, major)
        for driver, wheels, majors in FITTING
        for torch, major in zip(TORCHES, majors, strict=True)
    ],
)
def test_what_fits_stays_and_all_else_goes(machine, driver, wheels, torch, major):
    machine(driver, torch, [f"cupy-cuda{wheel}x" for wheel in wheels])
    *before, install = steps(requirements.install_command())
    assert install == ["pip", "install", *EXTRAS[f"cuda{major}"]]
    wrong = [f"cupy-cuda{wheel}x" for wheel in wheels if wheel != major]
    expected = [["pip", "uninstall", "-y", *wrong]] if wrong else []
    if wrong and major in wheels:
        again = f"cupy-cuda{major}x>=14.2"
        expected.append(["pip", "install", "--force-reinstall", "--no-deps", again])
    assert before == expected


def test_a_cupy_that_was_built_here_makes_room_for_a_wheel(machine):
    machine(13000, wheels=["cupy"])
    assert steps(requirements.install_command()) == [
        ["pip", "uninstall", "-y", "cupy"],
        ["pip", "install", *EXTRAS["cuda13"]],
    ]


@pytest.mark.parametrize(
    "torch",
    [
        None,
        "",
        "cuda = ",
        "cuda = 12",
        "cuda = 'unknown'",
        "import a_module_that_is_missing",
        "raise RuntimeError('broken')",
    ],
)
def test_a_broken_torch_is_no_hindrance(machine, torch):
    machine(torch=torch)
    assert requirements.install_command().startswith('pip install "cupy-cuda12x')


@pytest.mark.parametrize("error", [importlib.metadata.PackageNotFoundError, OSError, ValueError])
def test_no_torch_is_no_hindrance(machine, monkeypatch, error):
    def missing(name):
        raise error(name)

    machine()
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert requirements.install_command().startswith('pip install "cupy-cuda12x')


# ---- drivers ----


@pytest.mark.parametrize("driver", [None, 12000, 13000])
def test_a_command_alone_helps_where_the_driver_does_not_hinder(machine, driver):
    machine(driver)
    assert requirements.remedy() == requirements.install_command()


@pytest.mark.parametrize(
    ("wheels", "newer"),
    [
        ([], "CUDA 12 (525.60 or newer, on Windows 528.33)"),
        (["cupy-cuda11x"], "CUDA 12 (525.60 or newer, on Windows 528.33)"),
        (["cupy-cuda13x"], "CUDA 13 (580 or newer)"),
    ],
)
def test_a_driver_that_no_cupy_fits_is_replaced_first(machine, wheels, newer):
    machine(11040, wheels=wheels)
    assert requirements.remedy() == (
        "the driver is too old, it runs CUDA 11.4 at most; "
        f"install a driver for {newer}, then {requirements.install_command()}"
    )


def test_a_driver_that_another_cupy_fits_leaves_the_choice(machine):
    machine(12090, wheels=["cupy-cuda13x"])
    assert requirements.driver_remedy(13) == (
        f"install a driver for CUDA 13 (580 or newer), or {requirements.install_command()}"
    )


@pytest.mark.parametrize(
    ("major", "words"),
    [
        (12, "install a driver for CUDA 12 (525.60 or newer, on Windows 528.33)"),
        (13, "install a driver for CUDA 13 (580 or newer)"),
        (14, "install a driver for CUDA 14 (https://www.nvidia.com/drivers)"),
    ],
)
def test_no_command_helps_a_driver_that_no_cupy_fits(machine, major, words):
    machine(11080, wheels=["cupy-cuda13x"])
    assert requirements.driver_remedy(major) == words


def test_the_readme_names_the_drivers():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert requirements.OLDEST_DRIVERS.keys() == requirements.REQUIREMENTS.keys()
    for major, drivers in requirements.OLDEST_DRIVERS.items():
        assert f"CUDA {major} ({drivers})" in readme
