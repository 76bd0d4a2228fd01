"""On what a result was measured."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

from cupy_paged import __version__, compiler, driver, info

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("flashinfer-python",)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda_runtime() -> str | None:
    try:
        import cupy

        version = cupy.cuda.runtime.runtimeGetVersion()
    except Exception:
        return None
    return f"{version // 1000}.{version % 1000 // 10}"


def package_digest() -> str:
    """One SHA-256 over what is in cupy_paged/, which has the kernels launched."""
    sha = hashlib.sha256()
    for path in sorted((ROOT / "cupy_paged").rglob("*.py"), key=Path.as_posix):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def describe() -> dict[str, Any]:
    changed = _git("status", "--porcelain", "--", "cupy_paged", "kernels")
    devices = driver.devices()
    return {
        "device": devices[0].name if devices else None,
        "devices": [str(device) for device in devices],
        "driver": driver.driver_version(),
        "driver_cuda": driver.driver_cuda_version(),
        "cuda_runtime": _cuda_runtime(),
        "nvrtc": info.nvrtc_version(),
        "python": platform.python_version(),
        "versions": {
            **info.framework_versions(),
            **{name: info.installed_version(name) for name in PEERS},
        },
        "cupy_paged": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": None if changed is None else bool(changed),
        "kernels_sha256": compiler.sources_digest(),
        "package_sha256": package_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
