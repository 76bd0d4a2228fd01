"""What an import brings in, what a wheel holds, and where the kernel sources are found."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.installation import EXTRAS, without
from support.receipt import ROOT

ATTEND = """
import numpy as np, cupy_paged
q = np.ones((1, 2, 8), np.float32)
cache = np.ones((1, 1, 16, 8), np.float32)
out = cupy_paged.paged_attention(
    q, cache, cache, np.zeros((1, 1), np.int32), np.array([3], np.int32), layout="HND"
)
assert np.allclose(out, 1)
"""


def python(code: str, cwd: Path = ROOT, **variables: str) -> str:
    # What is on the path of this process is not to be found by an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_names() -> set[str]:
    return {path.name for path in (ROOT / "kernels").iterdir() if path.suffix in {".cu", ".cuh"}}


def test_import_loads_no_framework():
    loaded = python("import sys, cupy_paged.interop; print(*sorted(sys.modules))").split()
    assert "cupy_paged" in loaded
    assert not {"torch", "jax", "cupy", "ml_dtypes"} & set(loaded)


def test_host_arrays_need_no_cupy():
    python(without("cupy", "cupy_backends", "cupyx") + ATTEND)


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("torch_ops", "torch", "interop"),
        ("jax_ops", "jax", "interop"),
        ("transformers", "torch", "transformers"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_a_missing_framework_is_named_with_the_extra_that_brings_it(module, missing, extra):
    if module == missing:
        pytest.importorskip("torch", reason="of two that are missing, torch is named")
    said = python(
        f"""{without(missing)}
try:
    import cupy_paged.interop.{module}
except ImportError as error:
    print(error)
"""
    )
    assert said.startswith(f"cupy_paged.interop.{module} needs ")
    assert f"(No module named '{missing}')" in said
    assert said.endswith(f': pip install "cupy-paged[{extra}]"\n')
    assert any(requirement.startswith(f"{missing}>=") for requirement in EXTRAS[extra])


def test_host_arrays_need_no_home():
    python(ATTEND, HOME=os.devnull, CUPY_CACHE_DIR=os.devnull)


def test_checkout_finds_its_sources():
    where = python("import cupy_paged.compiler as c; print(c.kernel_dir())").strip()
    assert Path(where).samefile(ROOT / "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: the test extra has it")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_kernels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    tops = {name.parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cupy_paged"}
    inside = {name.name for name in names if name.parent == Path("cupy_paged/kernels")}
    assert inside == kernel_names()
    modules = {name.relative_to(ROOT) for name in (ROOT / "cupy_paged").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.name == "LICENSE" for name in names)


def test_installed_wheel_finds_its_sources(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import cupy_paged.compiler as c; print(c.__file__); print(c.kernel_dir())"
    module, folder = map(Path, python(code, tmp_path).split("\n")[:2])
    assert module.is_relative_to(tmp_path)
    assert folder == tmp_path / "cupy_paged" / "kernels"
    assert {path.name for path in folder.iterdir()} == kernel_names()
    python(ATTEND, tmp_path)


def test_editable_install_offers_no_second_top_level_module(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: the test extra has it")
    pytest.importorskip("editables", reason="editable wheels need it: the test extra has it")
    code = f"from hatchling.build import build_editable\nprint(build_editable({str(tmp_path)!r}))\n"
    name = python(code).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import cupy_paged.compiler as c, importlib.util\n"
        "print(c.kernel_dir())\n"
        "print(importlib.util.find_spec('kernels'), importlib.util.find_spec('tests'))\n"
    )
    folder, specs = python(code, tmp_path).splitlines()
    assert Path(folder).samefile(ROOT / "kernels")
    assert specs == "None None"
