"""The peers: what they decline, and that each is called for the same result."""

import functools
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import attention_suite, data, frameworks, merge_suite, peers, run
from benchmarks.peers import flashinfer_decode, pallas, sdpa, xqa
from benchmarks.prepared import Unsupported
from benchmarks.shapes import DTYPES, LAYOUTS, Shape
from support.benchmark_host import FakeReplay, HostArrays, attend, small_case, small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


def test_every_peer_has_the_same_face():
    for name in peers.MODULES:
        module = peers.load(name)
        assert module.VARIANTS
        assert module.ARRANGEMENT in (*LAYOUTS, "heads first", "dense")
        assert callable(module.version)
        assert callable(module.prepare)


def test_peers_decline_what_they_do_not_do():
    def sets(dtypes="bf16", **fields):
        return data.DataSets(
            Shape("x", **{"seq_lens": (32,)} | fields), dtypes, 2, None, None, None
        )

    for module, given in (
        (sdpa, sets("fp8")),
        (sdpa, sets(seq_lens=(3, 5))),
        (pallas, sets("fp8")),
        (xqa, sets(block_size=8)),
    ):
        with pytest.raises(Unsupported):
            module.prepare("", given, None)


def test_page_indices_are_the_live_entries():
    table = np.array([[3, 0, 0], [4, 5, 6]], np.int32)
    assert flashinfer_decode.page_indices(table, (1, 3)).tolist() == [3, 4, 5, 6]


def test_tables_are_padded_for_pallas():
    assert pallas.padded(np.zeros((2, 3, 17), np.int32)).shape == (2, 3, 32)
    assert [pallas.pages_per_compute_block(w) for w in (16, 32, 48, 64, 512)] == [1, 2, 1, 4, 8]


def test_a_peer_that_is_missing_is_named():
    def load(name):
        if name == "xqa":
            return SimpleNamespace(version=lambda: "0.6.4")
        raise ImportError("No module named 'x'")

    ready, found = run.find_systems(["ours", "floor", "xqa", "jax"], load)
    assert ready == ["ours", "floor", "xqa"]
    assert found == {"xqa": "0.6.4", "jax": "not installed: No module named 'x'"}


# ---- on the host ----


class HostTorch(frameworks.Torch):
    def __init__(self):
        self.torch = pytest.importorskip("torch", reason="this peer takes torch tensors")
        self.device = "cpu"

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


class HostJax(frameworks.Jax):
    def __init__(self):
        self.jax = pytest.importorskip("jax", reason="this peer takes JAX arrays")

    def view(self, memory, dtype, shape, offset=0):
        return self.jax.numpy.asarray(HostArrays().view(memory, dtype, shape, offset=offset))

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


def gathered(cache, blocks, seq_len):
    """[num_kv_heads, seq_len, head_size] of a cache [num_blocks, block_size, heads, head_size]."""
    return cache[blocks].flatten(0, 1)[:seq_len].float().numpy().swapaxes(0, 1)


class FlashInfer:
    """What is used of the library, in plain indexing, with its own signatures."""

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False):
            assert float_workspace_buffer.any() == 0
            self.swap = kv_layout == "HND"

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            *, q_data_type, kv_data_type,
        ):  # fmt: skip
            pages = np.diff(indptr.numpy())
            self.lens = (pages - 1) * page_size + last_page_len.numpy()
            self.blocks = np.split(indices.numpy(), indptr.numpy()[1:-1])
            self.types = q_data_type, kv_data_type

        def run(self, q, paged_kv_cache, *, out):
            assert (q.dtype, paged_kv_cache[0].dtype) == self.types
            caches = [a.transpose(1, 2) if self.swap else a for a in paged_kv_cache]
            scale = q.shape[-1] ** -0.5
            for i, (blocks, n) in enumerate(zip(self.blocks, self.lens, strict=True)):
                k, v = (gathered(cache, blocks, n) for cache in caches)
                found = attend(q[i].float().numpy(), k, v, scale)
                out[i] = out.new_tensor(found)

    @staticmethod
    def xqa(
        q, k_cache, v_cache, page_table, seq_lens, output, workspace_buffer, semaphores,
        num_kv_heads, page_size, *, kv_layout="NHD",
    ):  # fmt: skip
        assert str(seq_lens.dtype) == "torch.uint32"
        assert seq_lens.shape == (len(q), 1)
        assert (k_cache.shape[1:3], kv_layout) == ((page_size, num_kv_heads), "NHD")
        for i, n in enumerate(seq_lens[:, 0].tolist()):
            blocks = page_table[i, : -(-n // page_size)]
            k, v = (gathered(cache, blocks, n) for cache in (k_cache, v_cache))
            found = attend(q[i, 0].float().numpy(), k, v, q.shape[-1] ** -0.5)
            output[i, 0] = output.new_tensor(found)

    @staticmethod
    def merge_state(v_a, s_a, v_b, s_b):
        assert s_a.shape == v_a.shape[:2]
        a, b = (s.exp2()[..., None] for s in (s_a, s_b))
        return ((v_a * a + v_b * b) / (a + b)).to(v_a.dtype), None


@pytest.fixture
def flashinfer(monkeypatch):
    stand_in = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FlashInfer.BatchDecodeWithPagedKVCacheWrapper,
        merge_state=FlashInfer.merge_state,
        __version__="0.6.4",
    )
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", SimpleNamespace(xqa=FlashInfer.xqa))
    for module in (flashinfer_decode, xqa, sdpa, merge_suite):
        monkeypatch.setattr(module, "Torch", HostTorch)
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(xqa, "WORKSPACE_BYTES", 16)


@pytest.mark.parametrize(
    ("name", "dtypes", "seq_lens"),
    [
        ("flashinfer", "bf16", (40, 7, 33)),
        ("flashinfer", "fp8", (40, 7, 33)),
        ("xqa", "bf16", (40, 7, 32)),
        ("xqa", "fp8", (40, 7, 32)),
        ("sdpa", "bf16", (48, 48)),
        ("sdpa", "fp16", (48, 48)),
    ],
)
def test_torch_peers_are_called_for_the_same_result(runner, flashinfer, name, dtypes, seq_lens):
    attention_suite.run(runner, [small_case(dtypes, seq_lens=seq_lens)], ["floor", name])
    _, *found = runner.result.measurements
    assert len(found) == len(peers.load(name).VARIANTS)
    for m in found:
        assert (m.status, m.system, m.efficiency) == ("ok", name, 1.0), m
        assert m.error < 1e-2


def test_pallas_is_called_for_the_same_result(runner, monkeypatch):
    monkeypatch.setattr(pallas, "Jax", HostJax)
    HostJax()
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    monkeypatch.setattr(
        kernel, "paged_attention", functools.partial(kernel.paged_attention, interpret=True)
    )
    attention_suite.run(runner, [small_case(seq_lens=(40, 7))], ["floor", "jax"])
    _, found = runner.result.measurements
    assert found.status == "ok", found
    assert found.error < 1e-2


def test_merge_suite_calls_flashinfer_for_the_same_result(runner, flashinfer):
    merge_suite.run(runner, [], ["flashinfer"], shapes=[merge_suite.MergeShape(130, 2, 16)])
    (found,) = runner.result.measurements
    assert found.status == "ok", found
    assert found.error < 1e-2


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("arrangement", [*LAYOUTS, "heads first"])
def test_torch_sees_the_memory_that_cupy_sees(runner, arrangement, dtypes):
    sets = data.build(runner.device, small_case(dtypes))
    torch, plain = HostTorch(), HostArrays()
    for ours, theirs in zip(
        sets.caches(plain, arrangement)[:2], sets.caches(torch, arrangement)[:2], strict=True
    ):
        expected = plain.floats(ours, sets.kv_dtype)
        np.testing.assert_array_equal(torch.floats(theirs, sets.kv_dtype), expected)
