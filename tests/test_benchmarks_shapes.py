"""What the benchmarks measure: problems, and data sets that outgrow the cache."""

import numpy as np
import pytest

from benchmarks import data, published, shapes
from benchmarks.shapes import DTYPES, LAYOUTS, Shape

MIB = 2**20


def test_anchors_hold_the_published_bytes():
    expected = {
        "b1_8k": 32, "b1_128k": 512, "b8_4k": 128, "b64_2k": 512, "b128_1k": 512, "b32_mha": 2048,
        "b32_g8": 1024, "b64_d64": 512, "b32_d256": 512,
    }  # fmt: skip
    found = {s.name: s.kv_bytes("bf16") for s in shapes.ANCHORS}
    assert found.pop("b256_rag") == pytest.approx(2.05 * 1024 * MIB, rel=0.005)
    assert found == {name: mib * MIB for name, mib in expected.items()}
    for s in shapes.ANCHORS:
        assert 2 * s.kv_bytes("fp8") == s.kv_bytes("fp16") == s.kv_bytes("bf16")


def test_anchors_are_those_of_the_published_tables():
    cases = {(c.shape.name, c.dtypes) for c in shapes.anchors()}
    assert cases == set(published.FLOORS)
    for times in published.ATTENTION.values():
        assert set(times) <= cases
    assert all(c.layouts == LAYOUTS for c in shapes.anchors())
    assert len(shapes.anchors(["fp16"], ["HND"])) == len(shapes.ANCHORS)


def test_wide_covers_what_it_says():
    cases = shapes.wide()
    found = {c.shape for c in cases}
    assert len({(c.shape.name, c.dtypes) for c in cases}) == len(cases)
    assert {s.num_heads // s.num_kv_heads for s in found} == {1, 3, 4, 7, 8, 16}
    assert {s.head_size for s in found} == {64, 80, 128, 256}
    assert {s.block_size for s in found} == {8, 16, 32, 64, 128}
    assert {s.batch for s in found} >= {1, 512}
    assert {c.dtypes for c in cases} == set(DTYPES)
    assert {layout for c in cases for layout in c.layouts} == set(LAYOUTS)
    assert max(s.max_seq_len for s in found) == 2**20
    long_tail = next(s for s in found if s.name == "long_tail")
    assert long_tail.max_seq_len > 20 * np.median(long_tail.seq_lens)
    # Two data sets of the largest fit a device of 80 GB many times over.
    assert max(s.kv_bytes("bf16") for s in found) <= 4 * 2**30


def test_given_dtypes_and_layouts_hold_for_every_shape():
    cases = shapes.wide(["fp8", "fp16"], ["vllm"])
    assert len(cases) == 2 * len(shapes.WIDE)
    assert {c.layouts for c in cases} == {("vllm",)}


def test_shape_says_what_it_is():
    assert str(shapes.ANCHORS[3]) == "64x2048, 32/8, 128"
    assert str(Shape("x", (5, 9), block_size=32)) == "2x(5..9), 32/8, 128, block 32"


@pytest.mark.parametrize(("mib", "sets"), [(1, 573), (16, 36), (32, 18), (512, 2), (2048, 2)])
def test_data_sets_outgrow_the_cache(mib, sets):
    assert data.num_sets(mib * MIB) == sets
    assert sets * mib * MIB >= 600e6


@pytest.mark.parametrize("scatter", ["pool", "set"])
def test_block_tables_use_each_block_once(scatter):
    shape = Shape("x", (40, 7, 33, 16))
    found = data.block_tables(shape, 5, scatter, 0)
    assert (found.shape, found.dtype) == ((5, 4, 3), np.int32)
    live = np.arange(3) < np.array([3, 1, 3, 1])[:, None]
    used = found[:, live]
    assert sorted(used.ravel()) == list(range(5 * 8))
    assert not found[:, ~live].any()
    own = np.arange(5)[:, None] == used // 8
    assert own.all() == (scatter == "set")
