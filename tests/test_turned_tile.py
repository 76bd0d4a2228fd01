"""The tile that turns values in shared memory is as wide as counted bank conflicts ask for."""

import math

import pytest

from cupy_paged.compiler import flatten, options
from support import nvrtc

pytest.importorskip("cupy", reason="CuPy brings NVRTC: the cuda12 and cuda13 extras have it")

BANKS = WARP = 32
WORD = 4  # bytes of a bank
CHANNELS = 64
TYPES = {1: "uint8", 2: "uint16", 4: "uint32"}


def pitch(size, tokens):
    """Elements from a token's row to the next one's."""
    of_word = WORD // size
    return CHANNELS + max(WARP // tokens // of_word * of_word, of_word)


def conflicts(addresses):
    """How many words the busiest bank is asked for at once."""
    banks = [{a // WORD for a in addresses if a // WORD % BANKS == bank} for bank in range(BANKS)]
    return max(map(len, banks))


def columns(size, tokens, token_width, row):
    """The worst access of a warp that takes `token_width` tokens of a channel, one at a time."""
    of_channel = tokens // token_width
    num_lanes = CHANNELS * of_channel
    return max(
        conflicts(
            (i % of_channel * token_width + j) * row * size + i // of_channel * size
            for i in range(first, min(first + WARP, num_lanes))
        )
        for first in range(0, num_lanes, WARP)
        for j in range(token_width)
    )


def token_widths(size, tokens):
    return {math.gcd(width, tokens) for width in (1, 2, 4, 8, 16) if width * size <= 16}


@pytest.mark.parametrize("size", TYPES)
def test_the_pitch_is_the_one_that_is_counted_with(size):
    asserts = [
        f"static_assert(cupy_paged::TurnedTile<cupy_paged::{TYPES[size]}, {tokens}>::PITCH == "
        f'{pitch(size, tokens)}, "{tokens} tokens");'
        for tokens in range(1, 17)
    ]
    nvrtc.compile("\n".join([flatten("gather_cache.cu"), *asserts]), [], 80, options())


@pytest.mark.parametrize("size", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
def test_columns_meet_no_bank_twice(size, tokens):
    for token_width in token_widths(size, tokens):
        assert columns(size, tokens, token_width, pitch(size, tokens)) == 1


@pytest.mark.parametrize("size", TYPES)
@pytest.mark.parametrize("tokens", [3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
def test_other_numbers_of_tokens_lose_nothing_by_it(size, tokens):
    odd = CHANNELS + WORD // size
    for token_width in token_widths(size, tokens):
        counted = columns(size, tokens, token_width, pitch(size, tokens))
        assert counted <= min(columns(size, tokens, token_width, odd), 3)


def test_conflicts_are_counted():
    assert conflicts(WORD * lane for lane in range(WARP)) == 1
    assert conflicts(lane for lane in range(WARP)) == 1
    assert conflicts(2 * WORD * lane for lane in range(WARP)) == 2
    assert conflicts(WORD * BANKS * lane for lane in range(WARP)) == WARP
    assert columns(4, 16, 1, CHANNELS + 1) == 2  # rows one word further apart
