"""Compile CUDA source for any architecture, without a GPU, and read what ptxas made of it.

Uses the NVRTC that CuPy loads, so the tests see the compiler that users get, of either CUDA major.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Resources(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_smem: int


class Compiled(NamedTuple):
    cubin: bytes
    log: str
    kernels: dict[str, Resources]


class CompileError(Exception):
    """NVRTC refused the source. The message is its log."""


def version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    return nvrtc.getVersion()


def supported_architectures() -> list[int]:
    from cupy.cuda import nvrtc

    return nvrtc.getSupportedArchs()


def compile(
    source: str, name_expressions: Sequence[str], arch: int, options: Sequence[str] = ()
) -> Compiled:
    """Compile `source` for sm_`arch` and list the resources of every kernel by its name expression.

    A kernel with C linkage is its own name expression.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "source.cu", [], [])
    try:
        for name in name_expressions:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [*options, f"-arch=sm_{arch}", "--ptxas-options=-v"])
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            what = f"sm_{arch}, {', '.join(name_expressions)}"
            raise CompileError(f"{what}: {error}\n{log}") from None
        log = nvrtc.getProgramLog(program)
        symbols = {nvrtc.getLoweredName(program, name): name for name in name_expressions}
        cubin = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    found = {
        symbols[symbol]: resources
        for symbol, resources in parse_log(log).items()
        if symbol in symbols
    }
    return Compiled(cubin, log, found)


def parse_log(log: str) -> dict[str, Resources]:
    """Resources by symbol, from what `--ptxas-options=-v` prints."""
    frames: dict[str, tuple[int, int, int]] = {}
    found: dict[str, Resources] = {}
    entry = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\w+)", line):
            function = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            frames[function] = (int(match[1]), int(match[2]), int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            found[entry] = Resources(int(match[1]), *frames[entry], int(smem[1]) if smem else 0)
    return found
