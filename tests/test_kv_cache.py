"""`PagedKVCache` on host arrays: contents through attention, arguments, pictures, staging."""

import copy
import ctypes
import gc
import pickle
import re
import weakref
import xml.etree.ElementTree

import numpy as np
import pytest

import cupy_paged
from cupy_paged import PagedKVCache, cache_picture, gpu, in_flight, kv_cache, staging
from support import compare, frameworks
from support.fake_cupy import FakeCuPy, host_empty
from support.kv_cache_suite import KVCacheSuite, Story
from support.small_cache import new, ones


@pytest.fixture(params=frameworks.writable(frameworks.host()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestKVCache(KVCacheSuite):
    pass


@pytest.mark.parametrize("end", [PagedKVCache.free, lambda c, s: c.truncate(s, 4)])
@pytest.mark.parametrize("by_hand", [False, True], ids=["write", "commit"])
def test_a_written_batch_cannot_change_what_others_find(end, by_hand, monkeypatch):
    cache = new()
    sequence = cache.add(range(6))
    batch = cache.batch([sequence])
    with monkeypatch.context() as patch:
        # As in the capture of a graph, after which the caller commits.
        patch.setattr(cache, "_is_capturing", lambda stream: by_hand)
        for _ in range(2):
            cache.write(0, ones(6), ones(6), batch)
    if by_hand:
        cache.commit(batch)
    end(cache, sequence)
    with pytest.raises(ValueError, match=r"^batch: is written, and a sequence of it was freed"):
        cache.write(0, 7 * ones(6), 7 * ones(6), batch)
    again = cache.add(range(6))
    assert again.num_cached == 4
    batch = cache.batch([again])
    cache.write(0, ones(2), ones(2), batch)
    assert (cache.attend(0, ones(1), batch) == 1).all()


def test_batch_is_pending_until_it_is_written_in_every_layer():
    cache = new(num_layers=2)
    sequence = cache.add(range(6))
    batch = cache.batch([sequence])
    cache.write(1, ones(6), ones(6), batch)
    cache.write(1, ones(6), ones(6), batch)
    assert (sequence.num_written, sequence.num_pending) == (0, 6)
    cache.write(0, ones(6), ones(6), batch)
    assert (sequence.num_written, sequence.num_pending) == (6, 0)
    cache.append(sequence, [1])
    cache.write(0, ones(1), ones(1), cache.batch([sequence]))
    assert sequence.num_pending == 1


def test_what_was_taken_back_during_a_step_is_left_out():
    cache = new(num_blocks=12)
    kept, cut, freed = (cache.add(range(5)) for _ in range(3))
    cache.write(0, ones(5), ones(5), cache.batch([kept]))
    cache.append(kept, [5])
    batch = cache.batch([kept, cut, freed])
    cache.truncate(cut, 2)
    cache.append(cut, [7, 8, 9])
    cache.free(freed)
    cache.write(0, ones(11), ones(11), batch)
    assert (kept.num_pending, cut.num_pending) == (0, 5)


def test_capture_writes_nothing(monkeypatch):
    cache = new()
    sequence = cache.add(range(3))
    batch = cache.batch([sequence])
    monkeypatch.setattr(cache, "_is_capturing", lambda stream: True)
    cache.write(0, ones(3), ones(3), batch)
    assert sequence.num_pending == 3
    with pytest.raises(RuntimeError, match="outside of the capture"):
        cache.batch([sequence])
    cache.commit(batch)
    assert sequence.num_pending == 0


def test_copies_of_a_step_are_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "cupy_paged.kv_cache.copy_blocks",
        lambda keys, values, pairs, **options: calls.append(pairs.tolist()),
    )
    cache = new(num_blocks=16)
    first = cache.add(range(6))
    cache.commit(cache.batch([first]))
    twins = [cache.fork(first) for _ in range(4)]
    for twin in twins:
        cache.append(twin, [1])
    assert calls == []
    cache.batch(twins)
    assert calls == [[[first.blocks[1], twin.blocks[1]] for twin in twins]]


@pytest.mark.parametrize("poison", [False, True])
def test_copies_that_touch_are_not_done_side_by_side(poison):
    story = Story(frameworks.host()[0], poison=poison)
    first = story.cache.add(range(6))
    story.step([first])
    for _ in range(5):  # a copy of a copy of ..., no batch between
        twin = story.cache.fork(first)
        story.cache.append(twin, [1])
        story.cache.truncate(twin, 6)
        story.cache.free(first)
        first = twin
    story.cache.append(first, [3])
    story.step([first])


@pytest.mark.parametrize("poison", [False, True])
def test_a_step_whose_blocks_were_given_away_cannot_be_written(poison):
    cache = new(num_blocks=6, block_size=4, poison=poison)
    first = cache.add([1, 2])
    cache.write(0, ones(2), ones(2), cache.batch([first]))
    aborted = cache.add([5, 6, 7])
    step = cache.batch([aborted])
    cache.free(aborted)
    fork = cache.fork(first)
    cache.append(fork, [3])  # its copy goes into the block that the step would write
    if poison:
        cache.free(cache.add([9]))
    else:
        cache.truncate(fork, 2)
        cache.append(cache.fork(fork), [4])
    with pytest.raises(ValueError, match="batch: is over; another one"):
        cache.write(0, 666 * ones(3), 666 * ones(3), step)
    cache.batch([fork])
    assert (cache.key_caches[0][fork.blocks[0], :, :2] == 1).all()


def test_a_cache_goes_with_its_last_reference_and_does_not_hold_on_to_like():
    like = np.ones(4, np.float32)
    shape = {"num_kv_heads": 2, "head_size": 8}
    cache = PagedKVCache(1, 8, **shape, like=like, num_host_blocks=4, poison=True)
    cache.offload(cache.add([1]))
    gone = weakref.ref(like)
    del like
    assert gone() is None
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_buffers_grow_where_no_bounds_were_given():
    story = Story(frameworks.host()[0], num_blocks=64)
    short = story.cache.add(range(3))
    one = story.step([short])
    long = story.cache.add(range(150))
    two = story.step([short, long])
    assert one.block_tables.shape[1] < two.block_tables.shape[1] == 64
    assert (one.max_seq_len, two.max_seq_len) == (3, 150)


def test_no_sequences():
    story = Story(frameworks.host()[0])
    batch = story.step([])
    assert batch.seq_lens.shape == (0,)
    story.step([], num_seqs=2, num_tokens=3)


def test_framework_and_dtype_are_those_of_like():
    torch = pytest.importorskip("torch")
    cache = new(framework=None, dtype=None, like=torch.empty(0, dtype=torch.bfloat16))
    assert cache.key_caches[0].dtype == torch.bfloat16
    assert cache.dtype == "bfloat16"
    assert isinstance(new(framework="torch", device="cpu").value_caches[0], torch.Tensor)
    assert new(dtype="fp8", head_size=16, layout="vllm").key_caches[0].dtype == np.uint8


def test_a_dtype_may_be_one_of_numpy_or_torch():
    torch = pytest.importorskip("torch")
    for dtype in np.dtype("float16"), np.float16, torch.float16:
        assert new(dtype=dtype).dtype == "float16"
    with pytest.raises(ValueError, match=r"^dtype: got 'int8', needs one of float16"):
        new(dtype=torch.int8)


def test_jax_cannot_hold_a_cache_but_use_one():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="immutable and cannot hold a cache"):
        new(framework=None, like=jax.numpy.zeros(1))
    with pytest.raises(TypeError, match="immutable"):
        new(framework="jax")
    cache = new()
    batch = cache.batch([cache.add(range(3))])
    with jax.default_device(jax.devices("cpu")[0]):
        cache.write(0, jax.numpy.ones((3, 2, 8)), jax.numpy.ones((3, 2, 8)), batch)
        out = cache.attend(0, jax.numpy.ones((1, 4, 8)), batch)
    assert isinstance(out, jax.Array)
    compare.close(np.asarray(out), np.ones((1, 4, 8)), "float32")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks: got 0"),
        ({"num_layers": 1.0}, TypeError, "num_layers"),
        ({"max_seq_len": 0}, ValueError, "max_seq_len: got 0"),
        ({"head_size": 12}, ValueError, "head_size 12 is not supported"),
        ({"block_size": 257}, ValueError, "block_size 257"),
        ({"layout": "XYZ"}, ValueError, "layout: unknown 'XYZ'"),
        ({"layout": "vllm", "dtype": "fp8"}, ValueError, "head_size: got 8"),
        ({"dtype": "int8"}, ValueError, "dtype: got 'int8'"),
        ({"dtype": None}, ValueError, "dtype: needs one of"),
        ({"framework": None}, TypeError, "like: is missing"),
        ({"framework": "tensorflow"}, ValueError, "framework: got 'tensorflow'"),
        ({"device": 1}, ValueError, "NumPy arrays are on the host"),
        ({"like": np.zeros(1)}, TypeError, "needs to come without them"),
        ({"framework": None, "like": 3}, TypeError, "like: got int"),
        ({"k_scale": [1.0, 2.0]}, ValueError, "k_scale: 2 scales"),
        ({"k_scale": -1}, ValueError, "k_scale: got -1, needs a positive float32"),
        ({"v_scale": 0}, ValueError, "v_scale: got 0, needs a positive"),
        ({"k_scale": float("nan")}, ValueError, "k_scale: got nan, needs a finite float32"),
        ({"v_scale": "1"}, TypeError, "v_scale: got '1', needs a number"),
        ({"k_scale": [None]}, TypeError, r"k_scale\[0\]: got None, needs a number"),
        ({"v_scale": np.ones(2, np.float32)}, ValueError, "v_scale: shape .2,., needs one element"),
        ({"k_scale": [np.ones(1)]}, TypeError, r"k_scale\[0\]: .* needs float32$"),
        ({"num_host_blocks": 1.5}, TypeError, "num_host_blocks: got 1.5, needs an int"),
    ],
)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        new(**options)


def test_rows_that_do_not_fit_the_batch():
    cache = new()
    sequence = cache.add(range(5))
    batch = cache.batch([sequence])
    query = np.ones((5, 1, 8), np.float32)
    for call, error, words in (
        (
            lambda: cache.attend(0, query, batch),
            ValueError,
            "^query: shape .* has 1 rows: each_tok",
        ),
        (lambda: cache.write(0, ones(6), ones(5), batch), ValueError, "^key: .* has 5 tokens"),
        (lambda: cache.write(0, ones(5), ones(4), batch), ValueError, "^value: .* has 5 tokens"),
        (lambda: cache.write(0, ones(5), ones(5), sequence), TypeError, "^batch: got Sequence"),
        (lambda: cache.write(ones(5), ones(5), 0, batch), TypeError, "^layer: "),
        (lambda: cache.add("hello"), TypeError, "^tokens: got str, needs token ids"),
        (lambda: cache.append(sequence, 7), TypeError, "^tokens: got int, needs token ids"),
        (lambda: cache.add(np.ones((1, 3), int)), TypeError, "^tokens: got ndarray, needs token"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert (len(sequence), sequence.num_written, cache.sequences) == (5, 0, [sequence])


@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
def test_an_error_names_what_the_caller_gave_and_no_array_of_the_cache(layout):
    cache = new(layout=layout)
    batch = cache.batch([cache.add(range(5))])
    query, rows = np.ones((1, 4, 8), np.float16), ones(5).astype(np.float16)
    for name, call in (
        ("query", lambda: cache.attend(0, query, batch)),
        ("key", lambda: cache.write(0, rows, rows, batch)),
    ):
        words = rf"^{name}: dtype float16, needs float32, as the cache holds$"
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match=r"^value: dtype float16 does not match key's float32"):
        cache.write(0, ones(5), rows, batch)
    with pytest.raises(TypeError, match=r"^query: dtype float64 is not supported"):
        cache.attend(0, query.astype(float), batch)
    for shape in (5, 3, 8), (5, 2, 4), (5, 16):
        words = rf"^key: shape {re.escape(str(shape))}, needs \[num_tokens, 2, 8\], as the cache"
        with pytest.raises(ValueError, match=words):
            cache.write(0, np.ones(shape, np.float32), np.ones(shape, np.float32), batch)
    for shape in (1, 3, 8), (1, 4, 4), (1, 32):
        words = rf"^query: shape {re.escape(str(shape))}, needs \[num_rows, a multiple of 2, 8\]"
        with pytest.raises(ValueError, match=words):
            cache.attend(0, np.ones(shape, np.float32), batch)


def test_an_error_names_what_is_in_another_place_than_the_cache(monkeypatch):
    cache = new()
    batch = cache.batch([cache.add(range(5))])

    def refuse(*arguments, **options):
        raise ValueError("key_cache: is on cuda:1, but query is on the host")

    monkeypatch.setattr(kv_cache, "paged_attention", refuse)
    monkeypatch.setattr(cache, "_leader", cache._leader._replace(device=1))
    with pytest.raises(ValueError, match=r"^query: is on the host, but the cache is on cuda:1$"):
        cache.attend(0, np.ones((1, 4, 8), np.float32), batch)


def test_sequences_may_come_from_a_generator():
    cache = new()
    sequences = [cache.add(range(count)) for count in (5, 3)]
    batch = cache.batch(sequence for sequence in sequences)
    assert batch.seq_lens.tolist() == [5, 3]
    assert [sequence for sequence, _, _ in batch.ends] == sequences


def test_wrong_batches():
    cache = new(max_num_seqs=2, max_num_tokens=8, max_seq_len=8)
    first, second = cache.add(range(5)), cache.add(range(4))
    for arguments, options, words in (
        ([[first, first]], {}, "one is named twice"),
        ([[first, second]], {}, "max_num_tokens: the batch has 9, the cache was made for 8"),
        ([[first]], {"each_token": True}, "max_num_seqs: the batch has 5"),
        ([[first]], {"num_tokens": 4}, "num_tokens: got 4, the batch has 5"),
        ([[first]], {"each_token": True, "num_seqs": 4}, "each token has a row: 5"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.batch(*arguments, **options)
    with pytest.raises(TypeError, match=r"^sequences: got one Sequence, needs a list"):
        cache.batch(first)
    with pytest.raises(cupy_paged.NeverFits, match="3 cache blocks needed, 2 to a sequence"):
        cache.append(first, range(4))
    with pytest.raises(ValueError, match="another cache's"):
        cache.batch([new().add([1])])
    old = cache.batch([first])
    cache.batch([second])
    with pytest.raises(ValueError, match="batch: is over; another one was taken since"):
        cache.write(0, ones(5), ones(5), old)
    other = new()
    foreign = other.batch([other.add(range(5))])
    for call in (
        lambda: cache.write(0, ones(5), ones(5), foreign),
        lambda: cache.attend(0, ones(1), foreign),
        lambda: cache.commit(foreign),
    ):
        with pytest.raises(ValueError, match=r"^batch: is another cache's"):
            call()
    for wrong, kind in (([first], "list"), (None, "NoneType")):
        for call in (lambda c, b: c.attend(0, ones(1), b), PagedKVCache.commit):
            for at in (cache, new()):
                with pytest.raises(TypeError, match=rf"^batch: got {kind}, needs what batch"):
                    call(at, wrong)
    assert first.num_pending == 5
    cache.free(first)
    with pytest.raises(ValueError, match="was freed"):
        cache.batch([first])


@pytest.mark.parametrize(("num_layers", "needs"), [(1, "0"), (2, "0 to 1")])
def test_a_layer_that_is_not_there_is_told_which_are(num_layers, needs):
    cache = new(num_layers=num_layers)
    batch = cache.batch([cache.add([1])])
    for layer in (-1, num_layers):
        with pytest.raises(ValueError, match=rf"^layer: got {layer}, needs {needs}$"):
            cache.write(layer, ones(1), ones(1), batch)
        with pytest.raises(ValueError, match=rf"^layer: got {layer}, needs {needs}$"):
            cache.attend(layer, ones(1), batch)


@pytest.mark.parametrize(
    ("name", "value", "whose"),
    [
        ("k_scale", 2.0, "cache"),
        ("v_scale", 2.0, "cache"),
        ("layout", "HND", "cache"),
        ("kv_cache_dtype", "auto", "cache"),
        ("key_cache", ones(1), "cache"),
        ("value_cache", ones(1), "cache"),
        ("block_tables", ones(1), "batch"),
        ("seq_lens", ones(1), "batch"),
    ],
)
def test_attend_gives_what_it_has_of_its_own(name, value, whose):
    cache = new()
    batch = cache.batch([cache.add([1])])
    with pytest.raises(TypeError, match=rf"^{name}: is the {whose}'s own, needs to be left out$"):
        cache.attend(0, ones(1), batch, scale=1.0, **{name: value})


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied(make):
    with pytest.raises(TypeError, match=r"^cache: can be neither copied nor pickled"):
        make(new())


def test_a_shared_block_counts_once():
    cache = new()
    first = cache.add(range(6))
    cache.commit(cache.batch([first]))
    twin = cache.fork(first)
    assert (cache.num_used, cache.num_available) == (2, 6)
    cache.append(twin, [1])
    assert cache.num_used == 3
    cache.free(first)
    cache.free(twin)
    assert (cache.num_used, cache.num_available) == (0, 8)


# ---- pictures ----


def pictured(num_blocks=300):
    cache = new(num_layers=2, num_blocks=num_blocks)
    first = cache.add(range(10))
    cache.commit(cache.batch([first]))
    cache.append(cache.fork(first), [1])
    cache.add(range(100, 250))
    done = cache.add(range(300, 309))
    cache.commit(cache.batch([done]))
    cache.free(done)
    return cache


def test_terminal_picture():
    assert str(pictured()).splitlines() == [
        'PagedKVCache: 2 layers of 2 x 8, float32, "HND", numpy on the host',
        "  blocks    300 of 4 tokens: 42 used (2 shared), 2 kept, 256 free",
        "  sequences 3, 171 tokens",
        "  memory    42.0 KiB used of 300.0 KiB",
        "  unused    5 slots of last blocks, 2.8% of all slots that sequences have",
        "  prefixes  0 blocks found, 41 not (0%); 0 evicted, 1 copied",
        "  |█▓▓▓▓▓▓▓▓░······················································|",
        "   █ shared  ▓ used  ░ kept  · free",
    ]


@pytest.mark.parametrize("num_blocks", [50, 300, 4096, 100_000])
def test_notebook_picture(num_blocks):
    cache = pictured(num_blocks)
    picture = cache._repr_html_()
    assert len(picture) < 120_000
    root = xml.etree.ElementTree.fromstring(picture.replace("&nbsp;", " "))
    paths = root.findall(".//{*}path")
    cells = {path[0].text: path.get("d").count("M") for path in paths}
    if num_blocks == 300:
        assert cells == {
            "free": 256,
            "kept": 2,
            "sequence 0: 10 tokens, 3 blocks": 3,
            "sequence 1: 11 tokens, 3 blocks": 1,
            "sequence 2: 150 tokens, 38 blocks": 38,
            "shared": 2,
        }
        colours = [path.get("fill") for path in paths]
        assert len(set(colours)) == len(colours)
    shared = cells.pop("shared")
    assert shared in (1, 2)
    assert sum(cells.values()) <= min(num_blocks, cache_picture.MAX_CELLS)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**70, "1048576.0 PiB")],
)
def test_bytes_in_words(count, words):
    assert cache_picture.num_bytes(count) == words


# ---- the way to the device ----


@pytest.fixture
def fake(monkeypatch):
    """A CuPy whose device memory is the host's, and whose copies run when `run` is called."""
    fake = FakeCuPy()
    fake.queued = []

    def memcpy2d_async(to, to_pitch, source, pitch, width, height, kind, stream):
        assert (kind, stream, fake.device) == (1, 7, 1)
        assert width <= to_pitch
        fake.queued += [(to + i * to_pitch, source + i * pitch, width) for i in range(height)]

    def run():
        for move in fake.queued:
            ctypes.memmove(*move)
        fake.queued.clear()

    class Event:
        ptr = 0

        def __init__(self, disable_timing):
            assert disable_timing

        @property
        def done(self):
            return not fake.queued

        def synchronize(self):
            run()

    monkeypatch.setattr(in_flight, "_queues", {})
    fake.run = run
    fake.cuda.Event = Event
    fake.cuda.runtime.memcpy2DAsync = memcpy2d_async
    fake.cuda.alloc_pinned_memory = lambda num_bytes: bytearray(num_bytes + 100)
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    return fake


def test_staging_sends_rows_and_never_overwrites_what_is_on_its_way(fake):
    rng = np.random.default_rng(0)
    sizes = (12, np.dtype(np.int64)), (35, np.dtype(np.int32)), (0, np.dtype(np.int32))
    sender = staging.Staging(1, staging.Staging.num_bytes(*sizes))
    targets = []
    for _ in range(3 * staging.NUM_SLOTS):
        tokens, tables = rng.integers(0, 99, (3, 4)), rng.integers(0, 99, (5, 7), np.int32)
        to = np.zeros((3, 6), np.int64), np.zeros((5, 9), np.int32)
        pieces = [
            staging.Piece(x, target.ctypes.data, target.strides[0])
            for x, target in zip((tokens, tables), to, strict=True)
        ]
        sender.send(7, [*pieces, staging.Piece(np.zeros((0, 3), np.int32), 0, 0)])
        targets += zip(to, (tokens.copy(), tables.copy()), strict=True)
        tokens[...] = tables[...] = -5
    assert 0 < len(fake.queued) <= staging.NUM_SLOTS * 8
    fake.run()
    for target, sent in targets:
        assert (target[:, : sent.shape[1]] == sent).all()
        assert not target[:, sent.shape[1] :].any()


def test_batches_on_a_device_are_three_small_copies(fake, monkeypatch):
    cache = new(max_num_seqs=4, max_num_tokens=16, max_seq_len=32)
    on_device = cache._leader._replace(device=1)
    monkeypatch.setattr(cache, "_leader", on_device)
    monkeypatch.setattr(kv_cache, "held_stream", lambda leader, stream: (7, stream))
    monkeypatch.setattr("cupy_paged.batches.empty", host_empty)
    sequences = [cache.add(range(5)), cache.add(range(9))]
    batch = cache.batch(sequences, num_seqs=3)
    assert len(fake.queued) == 3 + 1 + 3
    fake.run()
    assert batch.seq_lens.tolist() == [5, 9, 0]
    assert batch.slot_mapping.shape == (14,)
    for row, sequence in zip(batch.block_tables, sequences, strict=False):
        assert row[: len(sequence.blocks)].tolist() == list(sequence.blocks)
