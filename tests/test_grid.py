"""What kernels/grid.py says of its quotients, in whole numbers; what it computes is seen through the kernels."""

import numpy as np


def test_one_correction_rounds_every_quotient_of_11_bits():
    """x * (1 / s), corrected once by fused multiply-adds, for x and s from 1 to 2: powers of two change no bit."""
    x = (1 + np.arange(1024) / 1024).astype(np.float32)[:, None]
    s = (1 + np.arange(1024) / 1024).astype(np.float32)[None, :]
    inverse = np.float32(1) / s
    product = x * inverse
    remainder = x.astype(np.float64) - product.astype(np.float64) * s  # exact: a whole number of 2^-34, below 2^-21
    units = np.ldexp(product.astype(np.float64), 58).astype(np.int64)
    units += np.ldexp(remainder, 34).astype(np.int64) * np.ldexp(inverse.astype(np.float64), 24).astype(np.int64)
    places = np.where(units >= 2**58, 35, 34)  # below the last of float32's 24 bits
    kept, cut, half = units >> places, units & ((1 << places) - 1), 1 << (places - 1)
    kept += (cut > half) | ((cut == half) & (kept % 2 == 1))
    assert (np.ldexp(kept.astype(np.float64), places - 58) == x / s).all()
    assert 0 < (product != x / s).mean() < 0.5
