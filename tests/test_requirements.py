"""The command that installs what GPU arrays need: what it names, and for which CUDA."""

import importlib.metadata
import shlex

import pytest

from cupy_paged import requirements
from support.fake_driver import FakeDriver
from support.installation import EXTRAS


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the driver's CUDA version, what torch's build says of CUDA, and the CuPy wheel."""

    def set_up(driver=None, torch=None, wheel=None):
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
            requirements, "installed_version", lambda name: "14.2.0" if name == wheel else None
        )

    return set_up


@pytest.mark.parametrize("major", [12, 13])
def test_the_command_names_what_the_extra_installs(major):
    assert shlex.split(requirements.install_command(major)) == [
        "pip", "install", *EXTRAS[f"cuda{major}"],
    ]  # fmt: skip


def test_the_oldest_cupy_is_the_one_that_pip_is_told():
    wheels = {wheel for wheel, major in requirements.CUPY_WHEELS.items() if major}
    assert {f"{wheel}>={requirements.OLDEST_CUPY}" for wheel in wheels} == {
        needed[0] for needed in requirements.REQUIREMENTS.values()
    }


@pytest.mark.parametrize(
    ("version", "is_too_old"),
    [("14.1.9", True), ("9.6.0", True), ("14.2.0", False), ("14.10.0rc1", False), ("15.0", False)],
)
def test_versions_of_cupy_are_compared_as_numbers(version, is_too_old):
    assert requirements.is_too_old(version) == is_too_old


FOR_CUDA_13 = "from typing import Optional\ncuda: Optional[str] = '13.0'\n"
FOR_CUDA_12 = "cuda = '12.8'\n"
FOR_THE_CPU = "cuda = None\n"


@pytest.mark.parametrize(
    ("found", "major"),
    [
        ({}, 12),
        ({"driver": 11080}, 12),
        ({"driver": 12020}, 12),
        ({"driver": 13010}, 13),
        ({"driver": 14000}, 13),
        ({"torch": FOR_THE_CPU}, 12),
        ({"torch": FOR_CUDA_12}, 12),
        ({"torch": FOR_CUDA_13}, 13),
        ({"driver": 12090, "torch": FOR_CUDA_13}, 12),
        ({"driver": 13000, "torch": FOR_CUDA_12}, 13),
        ({"driver": 13000, "wheel": "cupy-cuda12x"}, 12),
        ({"torch": FOR_CUDA_12, "wheel": "cupy-cuda13x"}, 13),
        ({"driver": 13000, "wheel": "cupy"}, 13),
    ],
)
def test_the_command_is_for_the_cupy_that_is_here_the_driver_or_torch(machine, found, major):
    machine(**found)
    assert requirements.install_command() == requirements.install_command(major)


def test_no_torch_is_no_hindrance(machine, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    machine()
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert requirements.install_command() == requirements.install_command(12)
