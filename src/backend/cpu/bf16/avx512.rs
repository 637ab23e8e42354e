//! Block products with AVX512-BF16, and the tile transpose both layouts need.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_load_si512, _mm512_max_ps, _mm512_reduce_add_ps,
    _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_shuffle_i32x4, _mm512_store_ps, _mm512_store_si512, _mm512_sub_ps,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::f32::consts::{LN_2, LOG2_E};
use std::mem::transmute;

use super::{BLOCK, Line, Sums, TILE_K, TILE_LINES};

/// Rows of `A` at a time: 8 × 2 sums hide the latency of a dot product and fit the registers.
const ROWS: usize = 8;

/// Whether the processor has the instructions.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("fma")
}

/// `sums = a b`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn block(a: &[Line], b: &[Line], sums: &mut Sums) {
    let (a, _) = a.as_chunks::<TILE_LINES>();
    let (b, _) = b.as_chunks::<TILE_LINES>();
    let (out, _) = sums.0.as_chunks_mut::<BLOCK>();
    for (group, out) in out.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut c = [[_mm512_setzero_ps(); 2]; ROWS];
        for (a, b) in a.iter().zip(b) {
            let a = &a.as_chunks::<ROWS>().0[group];
            for pair in 0..16 {
                let columns = [as_bf16(load(&b[pair])), as_bf16(load(&b[16 + pair]))];
                for (a, c) in a.iter().zip(&mut c) {
                    let a = as_bf16(_mm512_set1_epi32(a.0[pair] as i32));
                    c[0] = _mm512_dpbf16_ps(c[0], a, columns[0]);
                    c[1] = _mm512_dpbf16_ps(c[1], a, columns[1]);
                }
            }
        }
        for (c, out) in c.iter().zip(out) {
            let (halves, _) = out.as_chunks_mut::<16>();
            for (c, out) in c.iter().zip(halves) {
                store(*c, out);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512((&raw const *line).cast()) }
}

#[target_feature(enable = "avx512f")]
fn store(c: __m512, out: &mut [f32; 16]) {
    // SAFETY: half a row of sums is 64 bytes, aligned to 64 because sums are.
    unsafe { _mm512_store_ps(out.as_mut_ptr(), c) };
}

#[target_feature(enable = "avx512f")]
fn as_bf16(pairs: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { transmute(pairs) }
}

/// `e^(factor · (x − shift))` as one row of a strip of `A`, and the sum before rounding.
///
/// As a power of two: `n` is the nearest whole number of the exponent, `2^r` of the rest, `|r| ≤
/// 1/2`, is its Taylor polynomial of degree 4, off by 4e-5, an eightieth of bf16's rounding.
#[target_feature(enable = "avx512f,avx512bf16,fma")]
pub(super) fn exp_row(x: &[f32], shift: f32, factor: f32, row: usize, strip: &mut [Line]) -> f32 {
    // (ln 2)ᵏ / k!, highest first.
    const TAYLOR: [f32; 5] = [0.009_618_129, 0.055_504_11, 0.240_226_5, LN_2, 1.0];
    let factor = factor * LOG2_E;
    let (slope, offset) = (_mm512_set1_ps(factor), _mm512_set1_ps(factor * shift));
    let floor = _mm512_set1_ps(-127.0);
    let exp = |x: __m512| {
        // The second operand of a maximum is what NaN gives.
        let t = _mm512_max_ps(floor, _mm512_fmsub_ps(x, slope, offset));
        let n = _mm512_roundscale_ps::<0>(t);
        let r = _mm512_sub_ps(t, n);
        let mut p = _mm512_set1_ps(TAYLOR[0]);
        for coefficient in &TAYLOR[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*coefficient));
        }
        _mm512_scalef_ps(p, n)
    };
    let (tiles, _) = strip.as_chunks_mut::<TILE_LINES>();
    let (chunks, _) = x.as_chunks::<TILE_K>();
    let mut sums = [_mm512_setzero_ps(); 2];
    for (x, tile) in chunks.iter().zip(tiles) {
        let (halves, _) = x.as_chunks::<16>();
        let (left, right) = (exp(as_floats(&halves[0])), exp(as_floats(&halves[1])));
        sums = [_mm512_add_ps(sums[0], left), _mm512_add_ps(sums[1], right)];
        let rounded = _mm512_cvtne2ps_pbh(right, left);
        // SAFETY: both are 512 bits without invalid values.
        tile[row] = unsafe { transmute::<__m512bh, Line>(rounded) };
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

#[target_feature(enable = "avx512f")]
fn as_floats(values: &[f32; 16]) -> __m512 {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { transmute(*values) }
}

/// Transposes a 16 × 16 tile of pairs.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(tile: &mut [Line; 16]) {
    let mut r: [__m512i; 16] = std::array::from_fn(|i| {
        // SAFETY: a line is 64 bytes, aligned to 64; AVX-512 is enabled here.
        unsafe { _mm512_load_si512((&raw const tile[i]).cast()) }
    });
    // 2 × 2 transposes of pairs, then of pairs of pairs: 4 × 4 inside each 128-bit lane.
    for i in (0..16).step_by(4) {
        let low =
            [_mm512_unpacklo_epi32(r[i], r[i + 1]), _mm512_unpacklo_epi32(r[i + 2], r[i + 3])];
        let high =
            [_mm512_unpackhi_epi32(r[i], r[i + 1]), _mm512_unpackhi_epi32(r[i + 2], r[i + 3])];
        r[i] = _mm512_unpacklo_epi64(low[0], low[1]);
        r[i + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
        r[i + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
        r[i + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
    }
    // Then a 4 × 4 transpose of the lanes.
    for i in 0..4 {
        let (a, b, c, d) = (r[i], r[i + 4], r[i + 8], r[i + 12]);
        let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<0xDD>(a, b), _mm512_shuffle_i32x4::<0xDD>(c, d)];
        r[i] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        r[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        r[i + 8] = _mm512_shuffle_i32x4::<0xDD>(even[0], even[1]);
        r[i + 12] = _mm512_shuffle_i32x4::<0xDD>(odd[0], odd[1]);
    }
    for (line, r) in tile.iter_mut().zip(r) {
        // SAFETY: a line is 64 bytes, aligned to 64.
        unsafe { _mm512_store_si512((&raw mut *line).cast(), r) };
    }
}
