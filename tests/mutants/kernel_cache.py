"""Faults in how kernels are compiled, kept and found again, and of CUDA after a fork."""

from mutants.mutant import Mutant

CACHE = "cupy_paged/kernel_cache.py"
COMPILER = "cupy_paged/compiler.py"
GPU = "cupy_paged/gpu.py"
TESTS = "tests/test_kernel_cache.py"
LOADING = "tests/test_loading.py"

MUTANTS = (
    Mutant(
        "an entry is believed whatever its digest",
        CACHE,
        "if digest != _digest(key, contents):",
        "if len(digest) < size:",
        TESTS,
    ),
    Mutant(
        "an entry of another kernel is believed",
        CACHE,
        '_DIGEST(key.encode() + b"\\0" + contents)',
        "_DIGEST(contents)",
        TESTS,
    ),
    Mutant(
        "what cannot be written stops the op",
        CACHE,
        """        _replace(path, _digest(key, contents) + contents)
    except OSError as error:""",
        """        _replace(path, _digest(key, contents) + contents)
    except FileNotFoundError as error:""",
        TESTS,
    ),
    Mutant(
        "what cannot be read stops the op",
        CACHE,
        """        return None
    except OSError as error:
        _report(error)
        return None""",
        """        return None
    except NotADirectoryError as error:
        _report(error)
        return None""",
        TESTS,
    ),
    Mutant(
        "half an entry is left behind on a full disk",
        CACHE,
        "            temporary.unlink()",
        "            pass",
        TESTS,
    ),
    Mutant(
        "an entry is written where others read it",
        CACHE,
        'temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")',
        "temporary = path",
        TESTS,
    ),
    Mutant(
        "two processes write into one file",
        CACHE,
        'temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")',
        'temporary = path.with_name(f"{path.name}.new")',
        TESTS,
    ),
    Mutant(
        "every kernel says that the cache is of no use",
        CACHE,
        "if next(_reports) == 0:",
        "if True:",
        TESTS,
    ),
    Mutant(
        "nobody says that the cache is of no use",
        CACHE,
        "if next(_reports) == 0:",
        "if next(_reports) == -1:",
        TESTS,
    ),
    Mutant(
        "CuPy writes where it could not make its folder",
        CACHE,
        '        os.environ[IN_MEMORY_VARIABLE] = "1"\n',
        "",
        TESTS,
    ),
    Mutant(
        "CuPy's folder is not what it was after the import",
        CACHE,
        "            os.environ[FOLDER_VARIABLE] = before",
        "            pass",
        TESTS,
    ),
    Mutant(
        "without a home, the cache is a folder named ~",
        CACHE,
        'if found.startswith("~"):',
        "if not found:",
        TESTS,
    ),
    Mutant(
        "an edited kernel meets its old binary",
        COMPILER,
        "parts = (kernel_cache.FORMAT, source, *names, *settings, _nvrtc_build())",
        "parts = (kernel.source, *names, *settings, _nvrtc_build())",
        TESTS,
    ),
    Mutant(
        "all kernels of a source are one",
        COMPILER,
        "parts = (kernel_cache.FORMAT, source, *names, *settings, _nvrtc_build())",
        "parts = (source, *settings, _nvrtc_build())",
        TESTS,
    ),
    Mutant(
        "a binary is for all chips",
        COMPILER,
        "parts = (kernel_cache.FORMAT, source, *names, *settings, _nvrtc_build())",
        "parts = (source, *names, *options(sm), _nvrtc_build())",
        TESTS,
    ),
    Mutant(
        "a binary is of all builds of NVRTC",
        COMPILER,
        "parts = (kernel_cache.FORMAT, source, *names, *settings, _nvrtc_build())",
        "parts = (source, *names, *settings)",
        TESTS,
    ),
    Mutant(
        "a compiled kernel is not kept",
        COMPILER,
        "        kernel_cache.keep(key, binary)\n",
        "",
        TESTS,
    ),
    Mutant(
        "a new chip gets the code of an old one",
        COMPILER,
        'return f"-arch=compute_{max(older)}"',
        'return f"-arch=compute_{min(older)}"',
        TESTS,
    ),
    Mutant(
        "threads compile a kernel each",
        COMPILER,
        "    with _lock:\n        found = _loaded.get(key)",
        "    if True:\n        found = _loaded.get(key)",
        LOADING,
    ),
    Mutant(
        "dynamic shared memory is not asked for",
        COMPILER,
        "        if kernel.shared_bytes:\n            attribute",
        "        if kernel.shared_bytes < 0:\n            attribute",
        LOADING,
    ),
    Mutant(
        "a child waits for a lock that its parent held",
        COMPILER,
        "    gpu.cupy()  # refuses to work in a forked process, whose lock may be held for ever\n",
        "",
        LOADING,
    ),
    Mutant(
        "threads import CuPy in each other's environment",
        GPU,
        "        with _importing.lock, kernel_cache.lets_cupy_in():",
        "        with kernel_cache.lets_cupy_in():",
        LOADING,
    ),
    Mutant(
        "an import that another thread had begun at the fork hangs the child",
        GPU,
        "in_forked_process(_importing.renew)  # another thread of the parent may have held it\n",
        "",
        LOADING,
    ),
    Mutant(
        "a child uses the CUDA of its parent",
        GPU,
        "in_forked_process(cupy.cache_clear)\n",
        "",
        LOADING,
    ),
    Mutant(
        "a child is refused a CUDA that works",
        GPU,
        "        if error.status == _INITIALIZATION_ERROR:",
        "        if error.status:",
        LOADING,
    ),
    Mutant(
        "a child repeats the calls of its parent",
        "cupy_paged/prepared.py",
        "gpu.in_forked_process(_kept.forget)\n",
        "",
        LOADING,
    ),
    Mutant(
        "a driver of an older minor version is refused",
        GPU,
        "if newest is None or major_of(newest) >= built_for:",
        "if newest is None or major_of(newest) > built_for:",
        LOADING,
    ),
    Mutant(
        "a machine without a driver cannot import CuPy",
        GPU,
        "if newest is None or major_of(newest) >= built_for:",
        'if major_of(newest or "0") >= built_for:',
        LOADING,
    ),
    Mutant(
        "torch's CUDA counts for more than the driver's",
        "cupy_paged/requirements.py",
        "driver_cuda_version() or _torch_cuda_version()",
        "_torch_cuda_version() or driver_cuda_version()",
        "tests/test_requirements.py",
    ),
)
