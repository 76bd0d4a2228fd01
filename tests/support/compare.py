"""Comparison in order: shape and dtype, places of NaN and infinity, then the error by norm."""

import ml_dtypes
import numpy as np

TOLERANCE = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 2e-5}
# One row has fewer elements than all of them to average its rounding over.
ROW_SLACK = 2.0


def _where(mask):
    return tuple(int(i) for i in np.argwhere(mask)[0])


def same_kind(got, want, dtype, what):
    """Check shape, dtype, and that NaN and infinities stand in the same places."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype.name == dtype, f"{what}: dtype {got.dtype.name}, expected {dtype}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(got) != test(want)
        if wrong.any():
            at = _where(wrong)
            raise AssertionError(
                f"{what}: {wrong.sum()} of {wrong.size} differ in being {name}, "
                f"first at {at}: {got[at]}, expected {want[at]}"
            )
    finite = np.isfinite(want)
    return np.where(finite, got, 0.0), np.where(finite, want, 0.0)


def close(got, want, dtype, what="out", tolerance=None, row_rounding=0.0):
    """Check ||got - want|| / ||want||, over everything and over each row (the last axis).

    row_rounding    by how much more rows may be off: an array of their shape, or one number
    """
    got, want = same_kind(got, want, dtype, what)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    error, size = np.linalg.norm(got - want), np.linalg.norm(want)
    row_error = np.linalg.norm(got - want, axis=-1)
    row_size = np.linalg.norm(want, axis=-1)
    allowed = np.broadcast_to(ROW_SLACK * tolerance + row_rounding, row_size.shape)
    assert error <= tolerance * size, (
        f"{what}: relative error {error / max(size, 1e-300):.3g}, at most {tolerance:.3g}; "
        + _worst_row(got, want, allowed)
    )
    bad = row_error > allowed * row_size
    assert not bad.any(), (
        f"{what}: {bad.sum()} of {bad.size} rows are off by too much; "
        + _worst_row(got, want, allowed)
    )


def _worst_row(got, want, allowed):
    error = np.linalg.norm(got - want, axis=-1)
    relative = error / np.maximum(np.linalg.norm(want, axis=-1), 1e-300)
    row = np.unravel_index(np.argmax(relative / allowed), relative.shape)
    element = int(np.argmax(np.abs(got[row] - want[row])))
    return (
        f"worst row {tuple(map(int, row))}: relative error {relative[row]:.3g}, at most "
        f"{allowed[row]:.3g}, at element {element}: {got[row][element]!r}, "
        f"expected {want[row][element]!r}"
    )


def close_lse(got, want, what="lse", tolerance=3e-5):
    """Check a float32 log-sum-exp: absolute near zero, relative to its size far from it."""
    got, want = same_kind(got, want, "float32", what)
    bad = np.abs(got - want) > tolerance * np.maximum(1.0, np.abs(want))
    if bad.any():
        at = _where(bad)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} wrong, first at {at}: {got[at]}, "
            f"expected {want[at]}"
        )


def rounding_of(max_logits):
    """What float32 logits as large as these lose in rounding, and so do their exponentials."""
    rounding = np.finfo(np.float32).eps * np.abs(max_logits)
    return np.where(max_logits == np.finfo(np.float32).min, 0.0, rounding)  # there was none


def close_sums(got, want, max_logits, what="exp_sums", tolerance=3e-5):
    """Check sums of exp(logit - max): logits far from zero are rounded before they are compared.

    Where the largest logit is the lowest float32 there was none, and the sum is a count of tokens.
    """
    got, want = same_kind(got, want, "float32", what)
    bad = np.abs(got - want) > (tolerance + rounding_of(max_logits)) * np.maximum(1.0, want)
    if bad.any():
        at = _where(bad)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} wrong, first at {at}: {got[at]}, "
            f"expected {want[at]}, of logits up to {max_logits[at]}"
        )


def bitwise(got, want, what="out", any_nan=False):
    """Check that two arrays have the same shape, dtype and bits; with `any_nan`, save in NaN."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    wrong = np.ascontiguousarray(got).view(unsigned) != np.ascontiguousarray(want).view(unsigned)
    if any_nan:
        wrong &= ~(np.isnan(got) & np.isnan(want))
    if wrong.any():
        at = _where(wrong)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements differ in bits, first at {at}: "
            f"{got[at]}, expected {want[at]}"
        )


def rounded(got, exact, what="output", slack=1e-5):
    """Check that float8 `got` is `exact` rounded to nearest and saturated.

    `exact` may itself be off by `slack` of its size, which decides near-ties either way.
    """
    limit = float(ml_dtypes.finfo(got.dtype).max)
    exact = np.clip(exact, -limit, limit)
    got_values, exact = same_kind(got, exact, got.dtype.name, what)
    nearest = exact.astype(got.dtype).astype(np.float64)
    bad = np.abs(got_values - exact) > np.abs(nearest - exact) + slack * np.abs(exact)
    if bad.any():
        at = _where(bad)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} not rounded to nearest, first at {at}: "
            f"{got_values[at]}, from {exact[at]}"
        )
