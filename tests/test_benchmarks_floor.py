"""The streaming read that attention is measured against, and the kernels of the benchmarks."""

import numpy as np
import pytest

from benchmarks import device, floor
from cupy_paged.dtypes import decode
from support import nvrtc
from support.benchmark_host import FakeReplay, HostArrays, HostDevice


def test_floor_reads_each_set_once_and_keeps_the_fastest(monkeypatch):
    host = HostDevice()
    arrays = HostArrays()
    variants = iter(floor.VARIANTS)

    def capture(calls):
        calls[0]()
        # The third candidate is the fastest.
        number = next(variants, None)
        return FakeReplay(calls, 50.0 if number in (floor.VARIANTS[2], None) else 80.0)

    monkeypatch.setattr(arrays, "capture", capture)
    floors = floor.Floors(host, arrays, 5)
    found = floors.time(host.memory(3 * 64), 64, 3)
    assert found.variant == floor.VARIANTS[2]
    assert found.timing.median == pytest.approx(50 / 3)
    assert set(host.reads) == {(0, 64), (64, 64), (128, 64)}
    assert floors.time(None, 64, 3) is found


def test_grids_fit_the_work():
    persistent, one_piece = floor.Variant(512, 4, 4), floor.Variant(256, 4, 0)
    assert persistent.grid(2**27, 132) == 4 * 132
    assert persistent.grid(2048 * 3 + 1, 132) == 4
    assert one_piece.grid(2**27, 132) == 2**17
    assert one_piece.grid(0, 132) == 1


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_kernels_compile_and_keep_their_loads_in_flight(sm):
    pytest.importorskip("cupy", reason="CuPy brings NVRTC: the cuda12 and cuda13 extras have it")
    names = {v.kernel: v for v in floor.variants(sm)}
    assert sm >= 80 or not any(v.far_prefetch for v in names.values())
    source = device.source("streaming_read.cu")
    compiled = nvrtc.compile(source, list(names), sm, device.OPTIONS)
    for name, used in compiled.kernels.items():
        assert not (used.spill_stores or used.spill_loads or used.stack), name
        assert used.registers > 4 * names[name].loads, name
    for v in floor.variants(sm):
        registers = compiled.kernels[v.kernel].registers
        assert sm < 80 or registers * v.threads * max(v.blocks_per_sm, 1) <= 64 * 1024, v
    fills = [f"fill<unsigned {bits}>" for bits in ("char", "short", "int")]
    filled = nvrtc.compile(device.source("fill.cu"), fills, sm, device.OPTIONS)
    assert set(filled.kernels) == set(fills)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float32"])
def test_random_data_is_ordinary(dtype):
    values = decode(device.normal_table(dtype), dtype)
    assert len(values) == device.TABLE_SIZE
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(1, abs=0.05)
