"""`python -m cupy_paged size`: how much of a KV cache fits."""

import pytest

from cupy_paged import PagedKVCache, __main__, size

SHAPE = ["size", "--layers", "32", "--kv-heads", "8", "--head-size", "128"]


def test_fits_without_a_gpu(capsys):
    assert __main__.main([*SHAPE, "--memory", "40GiB", "--max-len", "5000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "memory              40.0 GiB",
        "a token             128.0 KiB",
        "a block             2.0 MiB, 16 tokens",
        "blocks              20,480",
        "tokens              327,680",
        "sequences of 5,000  65",
    ]


def test_lengths_without_a_longest(capsys):
    assert __main__.main([*SHAPE, "--memory", "1GB", "--dtype", "fp8", "--block-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "a block               2.0 MiB, 32 tokens" in out
    assert "sequences of 2,048    7" in out


def test_asks_the_gpu(capsys, monkeypatch):
    monkeypatch.setattr(size, "free_memory", lambda device: (device + 1) * 2**30)
    assert __main__.main([*SHAPE, "--device", "1"]) == 0
    assert "memory                2.0 GiB free on cuda:1" in capsys.readouterr().out


def test_without_a_gpu_says_what_to_give(capsys, monkeypatch):
    def no_driver(device):
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(size, "free_memory", no_driver)
    assert __main__.main(SHAPE) == 1
    assert "(no driver): give --memory" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "float32", "fp8"])
def test_is_what_a_cache_takes(dtype):
    shape = {"head_size": 16, "block_size": 4}
    cache = PagedKVCache(3, 7, num_kv_heads=2, dtype=dtype, framework="numpy", **shape)
    arrays = cache.key_caches + cache.value_caches
    assert cache.num_bytes == sum(a.nbytes for a in arrays)
    found = size.fit(cache.num_bytes, layers=3, kv_heads=2, dtype=dtype, **shape)
    assert (found.num_blocks, found.block_bytes) == (7, cache.block_bytes)
    assert size.fit(cache.num_bytes - 1, layers=3, kv_heads=2, dtype=dtype, **shape).num_blocks == 6


@pytest.mark.parametrize(
    ("words", "memory"), [("40GiB", 40 * 2**30), ("1.5 gb", 15 * 10**8), ("4096", 4096)]
)
def test_memory_in_words(words, memory):
    assert size.memory_of(words) == memory


@pytest.mark.parametrize("words", ["", "GiB", "40 parsecs", "-1GB"])
def test_wrong_memory(words, capsys):
    with pytest.raises(SystemExit):
        __main__.main([*SHAPE, f"--memory={words}"])
    assert "needs a number and a unit" in capsys.readouterr().err


def test_memory_of_less_than_a_block(capsys):
    assert __main__.main([*SHAPE, "--memory", "40"]) == 1
    assert "memory: got 40 B, and a block takes 2.0 MiB" in capsys.readouterr().out


def test_wrong_shape(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["size", "--layers", "0", "--kv-heads", "8", "--head-size", "128"])
    assert "argument --layers: got 0, needs at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (["--head-size", "127"], "head_size 127 is not supported, needs a multiple of 8"),
        (["--head-size", "520"], "head_size 520 is not supported"),
        (["--block-size", "1000"], "block_size 1000 is not supported, needs 1 to 256"),
    ],
)
def test_shapes_that_no_cache_can_have(shape, words, capsys):
    assert __main__.main([*SHAPE, "--memory", "40GiB", *shape]) == 1
    assert words in capsys.readouterr().out
