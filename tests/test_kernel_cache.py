"""A kernel's binary, by the real NVRTC or from disk, whatever has become of the cache's folder.

tests/gpu/test_kernel_cache.py has the same with kernels that run.
"""

import builtins
import concurrent.futures
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cupy_paged import compiler, gpu, kernel_cache
from support import cache_faults, first_calls
from support.cache_faults import DAMAGES, ENTRIES, USELESS_FOLDERS
from support.elf import machine_code
from support.first_calls import ARCHITECTURE, small_kernels
from support.receipt import ROOT

pytest.importorskip("cupy", reason="CuPy brings NVRTC: the cuda12 and cuda13 extras have it")

KERNEL, OTHER = small_kernels()


def code_of(binary):
    """A kernel's name and a digest of its machine code."""
    return binary.symbol, hashlib.sha256(machine_code(binary.image, binary.symbol)).hexdigest()


class Cache:
    """A folder of a test's own, and the names of the kernels that this process has compiled."""

    def __init__(self, path, compiled, caplog):
        self.path, self.compiled, self._caplog = path, compiled, caplog

    def binary(self, kernel=KERNEL, arch=ARCHITECTURE, sm=None):
        return compiler.binary_of(kernel, arch, sm)

    def code(self, kernel=KERNEL):
        return code_of(self.binary(kernel))

    def entries(self):
        return sorted(self.path.glob(ENTRIES))

    def files(self):
        return sorted(self.path.iterdir())

    def warnings(self):
        return [r.getMessage() for r in self._caplog.records if r.levelno >= logging.WARNING]

    def later_process(self):
        """What was compiled so far, after which nothing is."""
        compiled = list(self.compiled)
        self.compiled.clear()
        return compiled


@pytest.fixture
def cache(tmp_path, monkeypatch, caplog):
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(path))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    monkeypatch.setattr(kernel_cache, "_reports", itertools.count())
    compiler._nvrtc_build()
    monkeypatch.setattr(compiler, "_compile", compiler._compile)  # to have it back
    return Cache(path, first_calls.count_compilations(), caplog)


@pytest.fixture(scope="module")
def right():
    """The code of kernels that no cache had a part in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_CACHE_IN_MEMORY", "1")
        return {k: code_of(compiler.binary_of(k, ARCHITECTURE, None)) for k in (KERNEL, OTHER)}


# ---- entries ----


def test_what_was_compiled_once_is_found(cache, right):
    for kernel in (KERNEL, OTHER, KERNEL):
        assert cache.code(kernel) == right[kernel]
    assert cache.compiled == [KERNEL.name, OTHER.name]
    assert cache.files() == cache.entries()
    assert len(cache.entries()) == 2
    assert cache.warnings() == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again_and_mended(cache, right, damage):
    cache.binary()
    (entry,) = cache.entries()
    cache.binary(OTHER)
    (other,) = set(cache.entries()) - {entry}
    cache.later_process()
    DAMAGES[damage](entry, other)
    is_swapped = "swapped" in damage
    for compiled in ([KERNEL.name, OTHER.name] if is_swapped else [KERNEL.name]), []:
        assert cache.code() == right[KERNEL]
        assert cache.code(OTHER) == right[OTHER]
        assert cache.later_process() == compiled
    assert cache.files() == sorted([entry, other]), "something was left behind"
    is_missing = damage in ("deleted", "a link to nothing")
    assert len(cache.warnings()) == (0 if is_missing else 1 + is_swapped)


def test_a_folder_in_the_place_of_an_entry_is_left_there(cache, right):
    cache.binary()
    (entry,) = cache.entries()
    entry.unlink()
    entry.mkdir()
    for _ in range(2):
        assert cache.code() == right[KERNEL]
    assert cache.compiled == [KERNEL.name] * 3
    assert cache.files() == [entry]
    assert len(cache.warnings()) == 1


def test_others_may_read_entries_as_the_umask_has_it(cache):
    before = os.umask(0o022)
    try:
        cache.binary()
    finally:
        os.umask(before)
    (entry,) = cache.entries()
    assert entry.stat().st_mode & 0o777 == 0o644


# ---- what a binary depends on ----


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Kernels to be edited, in place of those of the package."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    monkeypatch.setattr(compiler, "kernel_dir", lambda: folder)
    monkeypatch.setattr(compiler, "flatten", compiler.flatten.__wrapped__)  # as in a new process
    return folder


def test_an_edited_header_never_meets_an_old_binary(cache, sources):
    text = compiler.flatten(KERNEL.source)
    used = [path for path in sources.iterdir() if path.read_text()[-300:] in text]
    assert {path.suffix for path in used} == {".cu", ".cuh"}
    before = cache.binary()
    for path in used:
        original = path.read_text()
        cache.later_process()
        path.write_text(original + "\nnamespace cupy_paged { struct Edited; }\n")
        cache.binary()
        assert cache.later_process() == [KERNEL.name], path.name
        path.write_text(original + "\n#error edited\n")
        with pytest.raises(RuntimeError, match="#error edited"):
            cache.binary()
        path.write_text(original)
        cache.later_process()
        assert cache.binary() == before
        assert cache.later_process() == [], path.name
    assert len(cache.entries()) == 1 + len(used)


@pytest.mark.parametrize("part", ["name", "architecture", "emulated chip", "build of NVRTC"])
def test_what_else_a_binary_depends_on(cache, monkeypatch, part):
    cache.binary()
    cache.later_process()
    if part == "name":
        cache.binary(OTHER)
    elif part == "architecture":
        assert cache.binary(arch=80).image != cache.binary().image
    elif part == "emulated chip":
        cache.binary(sm=75)
    else:
        monkeypatch.setattr(compiler, "_nvrtc_build", lambda: "another")
        cache.binary()
    assert len(cache.later_process()) == 1
    assert len(cache.entries()) == 2


# ---- folders ----


def test_a_folder_that_is_missing_is_made(cache, monkeypatch):
    folder = cache.path / "new" / "deep"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    cache.binary()
    cache.binary()
    assert cache.compiled == [KERNEL.name]
    shutil.rmtree(cache.path)  # while the process runs
    cache.binary()
    assert cache.compiled == [KERNEL.name] * 2
    assert len(list(folder.glob(ENTRIES))) == 1
    assert cache.warnings() == []


@pytest.mark.parametrize("fault", USELESS_FOLDERS)
def test_a_useless_folder_costs_a_compilation_and_one_warning(cache, right, monkeypatch, fault):
    folder = USELESS_FOLDERS[fault](cache.path)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    for kernel in (KERNEL, OTHER):
        assert cache.code(kernel) == right[kernel]
    assert cache.compiled == [KERNEL.name, OTHER.name]
    (warning,) = cache.warnings()
    assert "set CUPY_CACHE_DIR to a folder" in warning
    assert str(folder) in warning


@pytest.mark.parametrize("step", ["open", "write", "replace"])
@pytest.mark.parametrize("code", ["EROFS", "EACCES", "ENOSPC", "EDQUOT", "EIO", "ESTALE"])
def test_a_write_that_fails_leaves_nothing_behind(cache, right, monkeypatch, step, code):
    cache.binary(OTHER)
    (old,) = cache.entries()

    def fail(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "entry")

    class FullFile:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            fail()

    def open_(*arguments):
        return fail() if step == "open" else FullFile(builtins.open(*arguments))

    if step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(kernel_cache, "open", open_, raising=False)
    for _ in range(2):
        assert cache.code() == right[KERNEL]
    assert cache.files() == [old]
    (warning,) = cache.warnings()
    assert os.strerror(getattr(errno, code)) in warning
    assert "CUPY_CACHE_DIR" in warning
    cache.later_process()
    assert cache.code(OTHER) == right[OTHER]
    assert cache.compiled == [], "what can be read is read"


def test_an_entry_that_may_not_be_read_is_compiled(cache, right, monkeypatch):
    cache.binary()

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert cache.code() == right[KERNEL]
    assert cache.compiled == [KERNEL.name] * 2
    assert "Permission denied" in cache.warnings()[0]


def test_nobody_knows_the_home_directory(cache, right, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user of no name
    monkeypatch.chdir(cache.path)
    assert cache.code() == right[KERNEL]
    assert cache.files() == [], "a folder was made whose name is ~"
    (warning,) = cache.warnings()
    assert "home directory is unknown" in warning


def test_in_memory_the_folder_is_not_touched(cache, right, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert cache.code() == right[KERNEL]
    assert cache.files() == []
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    cache.binary()
    assert len(cache.files()) == 1


def test_writers_of_one_entry_do_not_disturb_each_other(cache, right, monkeypatch):
    replace = os.replace

    def another_first(*paths):
        monkeypatch.setattr(os, "replace", replace)
        cache.binary()  # finds nothing yet, and is done sooner
        replace(*paths)

    monkeypatch.setattr(os, "replace", another_first)
    cache.binary()
    assert cache.later_process() == [KERNEL.name] * 2
    assert cache.code() == right[KERNEL]
    assert cache.compiled == cache.warnings() == []
    assert cache.files() == cache.entries()


@pytest.mark.parametrize("value", [None, "", "below a file"])
def test_cupy_is_let_in_and_the_environment_is_left_as_it_was(cache, monkeypatch, value):
    """CuPy makes the folder that CUPY_CACHE_DIR says at its import, or fails."""
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setenv("HOME", str(cache.path))
    if value is None:
        monkeypatch.delenv("CUPY_CACHE_DIR")
    else:
        value = value and str(cache_faults.below_a_file(cache.path))
        monkeypatch.setenv("CUPY_CACHE_DIR", value)
    before = dict(os.environ)
    with kernel_cache.lets_cupy_in():
        assert os.path.isdir(os.environ["CUPY_CACHE_DIR"])
        assert kernel_cache.is_in_memory() == bool(value)
    assert {**os.environ, "CUPY_CACHE_IN_MEMORY": "0"} == before
    assert len(cache.warnings()) == bool(value)


# ---- processes ----


IMPORTS = {
    "HOME is a file": ("binaries", {"HOME": os.devnull}),
    "CUPY_CACHE_DIR is a file": ("binaries", {"CUPY_CACHE_DIR": os.devnull}),
    "CUPY_CACHE_DIR is read-only": ("binaries", {"CUPY_CACHE_DIR": "{read-only}"}),
    "CUPY_CACHE_DIR is below what is read-only": (
        "binaries",
        {"CUPY_CACHE_DIR": "{read-only}/new"},
    ),
    "the disk is full": ("binaries_on_a_full_disk", {"CUPY_CACHE_DIR": "{new}"}),
}
"""By name: what a process does, and the variables that it has beside or instead of its own."""


class Processes:
    """Processes that are told to start together, and asked one by one."""

    def __init__(self, workers, folder):
        self._workers, self._folder, self._runs = workers, folder, {}

    def start(self, name, what, arguments):
        home = self._folder / name.replace(" ", "-")
        home.mkdir()
        ro = self._folder / f"{home.name}-ro"
        ro.mkdir()
        places = {"read-only": cache_faults.unwritable(ro), "new": home / "new"}
        arguments = {
            key: value.format(**places) if isinstance(value, str) else value
            for key, value in arguments.items()
        }
        variables = {"HOME": str(home), **arguments}
        env = variables.pop("env", {k: v for k, v in os.environ.items() if "CUPY_CACHE" not in k})
        self._runs[name] = self._workers.submit(first_calls.run, what, env=env, **variables)

    def result(self, name):
        return self._runs[name].result()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        processes = Processes(workers, tmp_path_factory.mktemp("processes"))
        processes.start("none", "binaries", {})
        for name, (what, variables) in IMPORTS.items():
            processes.start(name, what, variables)
        processes.start("without NVRTC", "without_nvrtc", {})
        yield processes


@pytest.mark.parametrize("fault", IMPORTS)
def test_a_process_without_a_cache_compiles_and_says_so_once(processes, fault):
    said = processes.result(fault)
    assert said["digest"] == processes.result("none")["digest"]
    assert said["compiled"] == [KERNEL.name, OTHER.name]
    (warning,) = said["warnings"]
    assert "set CUPY_CACHE_DIR to a folder" in warning


def test_a_process_with_a_cache_has_nothing_to_say(processes):
    said = processes.result("none")
    assert said["warnings"] == []
    assert not said["in_memory"]


def test_a_bare_environment_is_enough(processes, tmp_path):
    said = first_calls.run("binaries", env={}, CUPY_CACHE_DIR=str(tmp_path))
    assert said["digest"] == processes.result("none")["digest"]
    assert said["warnings"] == []
    assert len(list(tmp_path.glob(ENTRIES))) == 2


def test_a_process_without_nvrtc_is_told_what_to_install(processes):
    said = processes.result("without NVRTC")
    assert said["error"].startswith("RuntimeError: NVRTC, which compiles kernels, cannot be loaded")
    assert 'pip install "cupy-cuda1' in said["error"]
    assert "no nvrtc" in said["cause"]


def test_a_process_that_is_killed_while_it_writes_harms_nobody(cache, right):
    with pytest.raises(AssertionError, match=f"exit status -{signal.SIGKILL.value}"):
        first_calls.run("killed_while_writing")
    assert cache.entries() == []
    assert cache.code() == right[KERNEL]
    assert len(cache.entries()) == 1


COLD_START = """
import json, os, sys
import cupy  # as slow as all the rest
from cupy_paged import gpu
from support import first_calls
gpu.cupy()
children = []
go, ready = os.pipe()
for _ in range({number}):
    read, write = os.pipe()
    if not os.fork():
        os.close(ready)
        os.read(go, 1)  # until the parent closes its end
        result = {{"compiled": first_calls.count_compilations()}}
        result |= first_calls.binaries()
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    children.append(read)
os.close(ready)
print(json.dumps([json.loads(open(read).read()) for read in children]))
"""


def test_processes_that_start_together_need_no_lock(cache, right):
    number = 16
    for is_first in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", COLD_START.format(number=number)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        children = json.loads(done.stdout)
        assert len(children) == number
        assert len({child["digest"] for child in children}) == 1
        compiled = {name for child in children for name in child["compiled"]}
        assert compiled == ({KERNEL.name, OTHER.name} if is_first else set())
        assert all(len(child["compiled"]) == len(set(child["compiled"])) for child in children)
        assert "cannot be kept" not in done.stderr
        assert cache.files() == cache.entries()
        assert len(cache.entries()) == 2
    assert cache.code() == right[KERNEL]
    assert cache.compiled == []


# ---- NVRTC ----


def test_a_chip_that_nvrtc_does_not_know_gets_ptx(cache):
    compiler.target.cache_clear()  # or nobody is told again
    for _ in range(2):
        binary = cache.binary(arch=999)
        newest = max(gpu.cupy().cuda.nvrtc.getSupportedArchs())
        assert f".target sm_{newest}\n".encode() in binary.image
        assert f".entry {binary.symbol}".encode() in binary.image
    assert cache.compiled == [KERNEL.name]
    (warning,) = cache.warnings()
    assert "does not know sm_999" in warning
    assert 'pip install "cupy-cuda1' in warning


def test_a_chip_too_old_for_nvrtc_is_named(cache):
    with pytest.raises(RuntimeError, match=r"compiles for sm_\d+ and newer, this device is sm_30"):
        cache.binary(arch=30)


@pytest.fixture
def broken_source(monkeypatch):
    monkeypatch.setattr(compiler, "flatten", lambda name: "nonsense;")


def test_a_source_that_nvrtc_refuses_is_shown_with_its_words(cache, broken_source):
    with pytest.raises(RuntimeError, match="convert_fp8") as found:
        cache.binary()
    assert "nonsense" in str(found.value)
    assert type(found.value.__cause__).__name__ == "NVRTCError"
    assert "pip" not in str(found.value)
    assert cache.files() == []


def test_an_old_nvrtc_is_suspected_of_what_it_refuses(cache, broken_source, monkeypatch):
    monkeypatch.setattr(compiler, "OLDEST_NVRTC", (99, 0))
    with pytest.raises(RuntimeError, match=r'99\.0 or newer may: pip install "cupy-cuda1'):
        cache.binary()


def test_kernels_need_no_header_of_cuda():
    sources = [path for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh")]
    assert sources
    assert not [path.name for path in sources if "#include <" in path.read_text(encoding="utf-8")]
