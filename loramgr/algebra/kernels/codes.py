"""Merged bits and residual codes of a tile, and the weight out of both, in the kernels' own arithmetic."""

import triton
import triton.language as tl

__all__ = ["counted", "decoded", "encoded", "merged_bits", "rounded", "turned", "valued"]

# Two 16-bit weights in one register, as the functions below do it for one, in half the instructions (sm_90).
# In: bits, two deltas. Out: merged bits, and both codes as of `_difference` in four bits (twice).
_ENCODE_BF16 = tl.constexpr("""{
.reg .b32 w0, w1, m0, m1, x0, x1;
shl.b32 w0, $3, 16;
and.b32 w1, $3, 0xffff0000;
add.rn.f32 m0, w0, $4;
add.rn.f32 m1, w1, $5;
cvt.rn.bf16x2.f32 $0, m1, m0;
shl.b32 m0, $0, 16;
and.b32 m1, $0, 0xffff0000;
sub.rn.f32 x0, m0, $4;
sub.rn.f32 x1, m1, $5;
sub.s32 x0, w0, x0;
sub.s32 x1, w1, x1;
add.s32 x0, x0, 0x17fff;
add.s32 x1, x1, 0x17fff;
prmt.b32 x0, x0, x1, 0x7632;
mov.b32 x1, 0x00030003;
min.u16x2 x0, x0, x1;
shr.u32 x1, x0, 14;
or.b32 x0, x0, x1;
and.b32 $1, x0, 15;
mov.b32 $2, $1;
}""")
_ENCODE_FP16 = tl.constexpr("""{
.reg .b16 h0, h1;
.reg .b32 m0, m1, x0, x1;
mov.b32 {h0, h1}, $3;
cvt.f32.f16 m0, h0;
cvt.f32.f16 m1, h1;
add.rn.f32 m0, m0, $4;
add.rn.f32 m1, m1, $5;
cvt.rn.f16x2.f32 $0, m1, m0;
mov.b32 {h0, h1}, $0;
cvt.f32.f16 m0, h0;
cvt.f32.f16 m1, h1;
sub.rn.f32 x0, m0, $4;
sub.rn.f32 x1, m1, $5;
cvt.rn.f16x2.f32 x0, x1, x0;
not.b32 x0, x0;
add.u16x2 x0, $3, x0;
mov.b32 x1, 0x00020002;
add.u16x2 x0, x0, x1;
mov.b32 x1, 0x00030003;
min.u16x2 x0, x0, x1;
shr.u32 x1, x0, 14;
or.b32 x0, x0, x1;
and.b32 $1, x0, 15;
mov.b32 $2, $1;
}""")
# In: bits, two deltas, and both codes in the bits 16 to 19 (twice). Out: bits of the weights.
_DECODE_BF16 = tl.constexpr("""{
.reg .b32 m0, m1, x0, x1, z0, z1;
.reg .pred p0, p1;
shl.b32 m0, $1, 16;
and.b32 m1, $1, 0xffff0000;
sub.rn.f32 x0, m0, $2;
sub.rn.f32 x1, m1, $3;
and.b32 z0, $4, 0x30000;
shr.u32 z1, $4, 2;
and.b32 z1, z1, 0x30000;
setp.eq.u32 p0, z0, 0x30000;
setp.eq.u32 p1, z1, 0x30000;
add.s32 x0, x0, z0;
add.s32 x1, x1, z1;
add.s32 x0, x0, 0xffff8000;
add.s32 x1, x1, 0xffff8000;
selp.b32 x0, m0, x0, p0;
selp.b32 x1, m1, x1, p1;
prmt.b32 $0, x0, x1, 0x7632;
}""")
_DECODE_FP16 = tl.constexpr("""{
.reg .b16 h0, h1;
.reg .b32 m0, m1, t0, t1;
mov.b32 {h0, h1}, $1;
cvt.f32.f16 m0, h0;
cvt.f32.f16 m1, h1;
sub.rn.f32 m0, m0, $2;
sub.rn.f32 m1, m1, $3;
cvt.rn.f16x2.f32 m0, m1, m0;
shr.u32 t0, $4, 16;
and.b32 t0, t0, 3;
shr.u32 t1, $4, 2;
and.b32 t1, t1, 0x30000;
or.b32 t0, t0, t1;
add.u16x2 m0, m0, t0;
mov.b32 m1, 0xffffffff;
add.u16x2 m0, m0, m1;
shr.u32 t1, t0, 1;
and.b32 t1, t1, t0;
and.b32 t1, t1, 0x00010001;
mul.lo.u32 t1, t1, 0xffff;
and.b32 m1, $1, t1;
not.b32 t1, t1;
and.b32 m0, m0, t1;
or.b32 $0, m0, m1;
}""")


# A weight is held as `raw` int32: the bits of float32 for bf16 (whose low half is 0) and fp32, its own bits for fp16.


@triton.jit
def _raw(bits, KIND: tl.constexpr):
    """Return loaded bits as raw."""
    if KIND == "bf16":
        raw = bits.to(tl.int32) << 16
    else:
        raw = bits.to(tl.int32)
    return raw


@triton.jit
def _bits(raw, KIND: tl.constexpr):
    """Return raw as the bits to store."""
    if KIND == "bf16":
        bits = (raw >> 16).to(tl.int16)
    elif KIND == "fp16":
        bits = raw.to(tl.int16)
    else:
        bits = raw
    return bits


@triton.jit
def _value(raw, KIND: tl.constexpr):
    """Return raw as float32 numbers."""
    if KIND == "fp16":
        value = raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = raw.to(tl.float32, bitcast=True)
    return value


@triton.jit
def valued(bits, KIND: tl.constexpr):
    """Return loaded bits as float32 numbers."""
    return _value(_raw(bits, KIND), KIND)


@triton.jit
def rounded(x, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the bits of float32 numbers rounded to nearest even."""
    raw = x.to(tl.int32, bitcast=True)
    if KIND == "bf16" and INTERPRETED:
        # The interpreter's own cast truncates. Adding half a unit, less one when even, carries into what stays.
        bits = tl.where((raw & 0x7FFFFFFF) <= 0x7F800000, (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)
    elif KIND == "bf16":
        bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif KIND == "fp16":
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = raw
    return bits


@triton.jit
def _difference(raw, x, KIND: tl.constexpr):
    """Return weight - candidate + 1 as unsigned integers, where the candidate is x rounded.

    What is rounded how does not matter as long as `_corrected` does the same: for bf16 ties go away from zero, which
    is one addition. So W - floor((x + 2^15) / 2^16) + 1 = floor((2^16 W - x + 2^15 - 1) / 2^16) + 1.
    """
    near = x.to(tl.int32, bitcast=True)
    if KIND == "bf16":
        difference = (raw - near + 0x17FFF).to(tl.uint32, bitcast=True) >> 16
    elif KIND == "fp16":
        near = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        difference = ((raw - near + 1) & 0xFFFF).to(tl.uint32, bitcast=True)
    else:
        difference = (raw - near + 1).to(tl.uint32, bitcast=True)
    return difference


@triton.jit
def _corrected(loaded, x, codes, KIND: tl.constexpr):
    """Return the raw weight for a difference as of `_difference`, or what was loaded for 3, which means escaped."""
    near = x.to(tl.int32, bitcast=True)
    if KIND == "bf16":
        raw = (near - 0x8000 + (codes << 16)) & -0x10000
    elif KIND == "fp16":
        raw = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) - 1 + codes
    else:
        raw = near - 1 + codes
    return tl.where(codes == 3, loaded, raw)


@triton.jit
def merged_bits(bits, delta, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the bits of round(W + D)."""
    return rounded(valued(bits, KIND) + delta, KIND, INTERPRETED)


@triton.jit
def encoded(bits, delta, KIND: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Merge, and return the bits and words (BLOCK_M, BLOCK_N / 16) of codes as of `_difference`, 3 for all others."""
    BLOCK_M: tl.constexpr = bits.shape[0]
    WORDS: tl.constexpr = bits.shape[1] // 16
    if PACKED:
        merged, pairs = tl.inline_asm_elementwise(
            _ENCODE_BF16 if KIND == "bf16" else _ENCODE_FP16,
            "=&r,=&r,=&r,r,r,r",
            [bits, delta],
            (tl.int16, tl.int32),
            is_pure=True,
            pack=2,
        )
        pairs, _ = tl.split(tl.reshape(pairs, (BLOCK_M, WORDS * 8, 2)))
        places = (tl.arange(0, 8) * 4)[None, None, :]
        words = tl.sum(tl.reshape(pairs, (BLOCK_M, WORDS, 8)) << places, axis=2).to(tl.uint32, bitcast=True)
    else:
        raw = _raw(bits, KIND)
        merged = merged_bits(bits, delta, KIND, INTERPRETED)
        codes = tl.minimum(_difference(raw, _value(_raw(merged, KIND), KIND) - delta, KIND), 3)
        places = (tl.arange(0, 16) * 2).to(tl.uint32)[None, None, :]
        words = tl.sum(tl.reshape(codes, (BLOCK_M, WORDS, 16)) << places, axis=2)
    return merged, words


@triton.jit
def decoded(bits, delta, words, KIND: tl.constexpr, PACKED: tl.constexpr):
    """Return the bits of the weight from merged bits and such words; what was escaped stays as it is."""
    BLOCK_M: tl.constexpr = bits.shape[0]
    BLOCK_N: tl.constexpr = bits.shape[1]
    WORDS: tl.constexpr = BLOCK_N // 16
    if PACKED:
        turns = ((16 - tl.arange(0, 8) * 4) & 31).to(tl.uint32)[None, None, :]
        turned = (words[:, :, None] << turns) | (words[:, :, None] >> ((0 - turns) & 31))
        pairs = tl.broadcast_to(turned[:, :, :, None], (BLOCK_M, WORDS, 8, 2))
        pairs = tl.reshape(pairs, (BLOCK_M, BLOCK_N)).to(tl.int32, bitcast=True)
        result = tl.inline_asm_elementwise(
            _DECODE_BF16 if KIND == "bf16" else _DECODE_FP16,
            "=&r,r,r,r,r,r",
            [bits, delta, pairs],
            tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        places = (tl.arange(0, 16) * 2).to(tl.uint32)[None, None, :]
        codes = tl.reshape((words[:, :, None] >> places) & 3, (BLOCK_M, BLOCK_N)).to(tl.int32)
        raw = _raw(bits, KIND)
        result = _bits(_corrected(raw, _value(raw, KIND) - delta, codes, KIND), KIND)
    return result


@triton.jit
def counted(escapes):
    """Return how many of the even bits are set."""
    pairs = (escapes & 0x33333333) + ((escapes >> 2) & 0x33333333)
    octets = (pairs + (pairs >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def turned(words, BACK: tl.constexpr):
    """Turn words of codes as `_difference` has them into those of `residual.py`, or back."""
    if BACK:
        result = ((words << 1) & 0xAAAAAAAA) | (~((words >> 1) ^ words) & 0x55555555)
    else:
        result = (~(words ^ (words << 1)) & 0xAAAAAAAA) | ((words >> 1) & 0x55555555)
    return result
