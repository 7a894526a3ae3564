"""Which blocks of tokens and outputs are computed one after another, in Gluon, where a GPU runs a part of them at once.

Programs that run together share a band of tokens, so that they read each other's weights and inputs from the L2 cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place_in_band(index, M, BLOCK_M: gl.constexpr, row_blocks, BLOCKS: gl.constexpr, band):
    """Return the first token and the first row block at ``index``: bands of ``band`` blocks of tokens, one by one."""
    in_band = band * gl.cdiv(row_blocks, BLOCKS)
    first = index // in_band * band
    width = min(gl.cdiv(M, BLOCK_M) - first, band)
    place = index % in_band
    return (first + place % width) * BLOCK_M, place // width * BLOCKS
