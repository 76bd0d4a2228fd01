"""A process in which kernels are needed for the first time: `python -m support.first_calls WHAT`.

Prints what came of it as one line of JSON: "right", whether results were; "compiled", the names of
the kernels that were compiled, in order; "warnings", what the library had to say; "in_memory".
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT, CHILD_TIMEOUT = 300, 60  # seconds
ARCHITECTURE = 90


def run(what: str, *arguments: str, root=TESTS.parent, env=None, **variables: str) -> dict:
    """Runs such a process on the package in `root`, and returns what it prints.

    Its environment is `env`, or that of this process, with some more variables.
    """
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-m", __name__, what, *arguments],
        env={**(os.environ if env is None else env), **paths, **variables},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, f"{what}: exit status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def count_compilations():
    """A list that gets the name of each kernel that is compiled."""
    from cupy_paged import compiler

    compiled, compile_ = [], compiler._compile

    def counting(source, filename, names, settings):
        compiled.extend(names)
        return compile_(source, filename, names, settings)

    compiler._compile = counting
    return compiled


# ---- without a GPU ----


def small_kernels():
    """Two of the same source, which take a tenth of a second each."""
    from cupy_paged.cache_ops import convert_kernel

    return convert_kernel("float16", "float8_e4m3fn"), convert_kernel("float8_e4m3fn", "float16")


def binaries():
    """Compiles and loads nothing: "digest" is one of the machine code."""
    from cupy_paged.compiler import binary_of
    from support.elf import machine_code

    digest = hashlib.sha256()
    for kernel in small_kernels():
        symbol, image = binary_of(kernel, ARCHITECTURE, None)
        digest.update(symbol.encode() + machine_code(image, symbol))
    return {"digest": digest.hexdigest()}


def binaries_on_a_full_disk():
    """A disk that takes no more than 100 bytes of a file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return binaries()


def killed_while_writing():
    """Ends as nobody can help, between the writing of an entry and its renaming."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return binaries()


def without_nvrtc():
    from cuda import pathfinder

    from cupy_paged import gpu

    gpu.cupy()

    def find_nothing(name):
        raise pathfinder.DynamicLibNotFoundError(f"no {name}")

    pathfinder.load_nvidia_dynamic_lib = find_nothing
    return error_of(binaries)


def error_of(function):
    try:
        function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "cause": repr(error.__cause__)}
    return {"error": None, "cause": None}


# ---- on a GPU ----


def calls(arrays):
    """Converts all codes of float8 to float16 and back: whether they are as on the host."""
    import numpy as np

    import cupy_paged

    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN has several codes
    results = []
    for make in arrays, HostArrays:
        halves, back = make.empty(codes.shape, np.float16), make.empty(codes.shape, np.uint8)
        cupy_paged.convert_fp8(halves, make.array(codes), 0.5)
        cupy_paged.convert_fp8(back, halves, 0.5)
        results.append((make.numpy(halves), make.numpy(back)))
    (halves, back), (expected, expected_back) = results
    return (
        halves.tobytes() == expected.tobytes()
        and back.tobytes() == expected_back.tobytes() == codes.tobytes()
    )


class HostArrays:
    @staticmethod
    def array(x):
        return x

    @staticmethod
    def empty(shape, dtype):
        import numpy as np

        return np.empty(shape, dtype)

    numpy = array


class CuPyArrays:
    """Of copies alone: no kernel of CuPy's own is compiled, for which it would want its cache."""

    @staticmethod
    def array(x):
        from cupy_paged import gpu

        return gpu.cupy().asarray(x)

    @staticmethod
    def empty(shape, dtype):
        from cupy_paged import gpu

        return gpu.cupy().empty(shape, dtype)

    @staticmethod
    def numpy(x):
        return x.get()


class TorchArrays:
    @staticmethod
    def array(x):
        import torch

        return torch.from_numpy(x).to("cuda")

    @staticmethod
    def empty(shape, dtype):
        import numpy as np
        import torch

        return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device="cuda")

    @staticmethod
    def numpy(x):
        return x.cpu().numpy()


ARRAYS = {"cupy": CuPyArrays, "torch": TorchArrays}


def ops():
    return {"right": calls(CuPyArrays)}


def ops_together(folder, number):
    """Waits, with CUDA at work, until so many processes have come to the same place."""
    CuPyArrays.array(HostArrays.empty(1, "float16"))
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + TIMEOUT / 2
    while len(os.listdir(folder)) < int(number):
        assert time.monotonic() < end, f"{len(os.listdir(folder))} of {number} came"
        time.sleep(0.001)
    return ops()


def ops_on_a_full_disk():
    """A disk that takes no more than 100 bytes of a file, once CUDA is at work."""
    import resource

    CuPyArrays.array(HostArrays.empty(1, "float16"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return ops()


def ops_in_threads(number):
    """So many threads call at once, each on arrays of its own."""
    ready, right = threading.Barrier(int(number)), []
    CuPyArrays.array(HostArrays.empty(1, "float16"))

    def call():
        ready.wait()
        right.append(calls(CuPyArrays))

    threads = [threading.Thread(target=call) for _ in range(int(number))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"right": right == [True] * int(number)}


def ops_after_fork():
    """The parent has imported the package; then both the child and the parent use CUDA."""
    import cupy_paged.interop  # noqa: F401

    child = in_child(ops)
    return {"child": child, **ops()}


def ops_before_fork(framework):
    """The parent has called ops; what the child is told that repeats the call, and then goes on."""
    import numpy as np

    import cupy_paged

    arrays = ARRAYS[framework]
    right = calls(arrays)
    output, given = arrays.empty((8,), np.float16), arrays.array(np.arange(8, dtype=np.uint8))
    for _ in range(2):  # checked, then known again
        cupy_paged.convert_fp8(output, given, 0.5)
    children = [
        in_child(lambda: error_of(lambda: cupy_paged.convert_fp8(output, given, 0.5))),
        in_child(lambda: error_of(lambda: cupy_paged.convert_fp8(output, given, 0.5, "fp8_e5m2"))),
    ]
    return {"children": children, "right": right and calls(arrays)}


def in_child(function):
    """What a function returns in a forked process."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with open(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return json.loads(said) if said else "nothing"
    signal.alarm(CHILD_TIMEOUT)  # a child that hangs would keep whoever waits for its parent
    with contextlib.suppress(BaseException), open(write, "w") as pipe:
        json.dump(function(), pipe)
    os._exit(0)  # what the parent has open is not the child's to close


def main(what: str, *arguments: str) -> None:
    warnings = Warnings()
    logging.getLogger("cupy_paged").addHandler(warnings)
    compiled = count_compilations()
    result = globals()[what](*arguments)
    from cupy_paged import kernel_cache

    result |= {"compiled": compiled, "warnings": warnings.messages}
    result["in_memory"] = kernel_cache.is_in_memory()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
