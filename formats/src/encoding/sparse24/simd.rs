//! Rows of a 2:4 matrix with the vector instructions of x86-64.
//!
//! Sixteen groups at a time: their 64 flags ("is not +0.0") fit one register, and so do their
//! sixteen nibbles, which are eight bytes of metadata. What to keep follows from the flags by a few
//! logical operations on all groups at once. The elements then move by mask (AVX-512 VBMI2) or by
//! byte shuffles with controls from a table (AVX2).
//!
//! Each function does the whole steps of [`STEP`] groups at the start of its slices and returns how
//! many groups that were and whether all were legal; the portable code does the rest. `unsafe` is
//! here for three reasons: loads and stores through pointers to arrays of the right size, prefetches,
//! and calls of functions that need a processor feature which [`has_avx2`] or [`has_avx512`] has found.
#![expect(unsafe_code, reason = "vector loads and stores, and calls that need a processor feature")]

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _MM_HINT_T0, _mm_castsi128_ps, _mm_cmpeq_epi16, _mm_cmpeq_epi32,
    _mm_loadl_epi64, _mm_loadu_si128, _mm_movemask_epi8, _mm_movemask_ps, _mm_packs_epi16,
    _mm_prefetch, _mm_setzero_si128, _mm_shuffle_epi8, _mm_storel_epi64, _mm_storeu_si128,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm512_castsi256_si512, _mm512_castsi512_si256,
    _mm512_loadu_si512, _mm512_maskz_compress_epi8, _mm512_maskz_compress_epi16,
    _mm512_maskz_compress_epi32, _mm512_maskz_expand_epi8, _mm512_maskz_expand_epi16,
    _mm512_maskz_expand_epi32, _mm512_storeu_si512, _mm512_test_epi8_mask, _mm512_test_epi16_mask,
    _mm512_test_epi32_mask,
};

/// Groups of a step.
const STEP: usize = 16;

/// Metadata bytes of a step.
const META: usize = STEP / 2;

/// Bit 0 of every nibble.
const LOW: u64 = 0x1111_1111_1111_1111;

/// Groups done, and whether all of them were legal.
type Done = (usize, bool);

/// Whether the AVX2 functions may run.
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Whether the AVX-512 functions may run.
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vbmi2")
}

pub(super) fn pack_avx2(
    element_bytes: usize,
    dense: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
) -> Done {
    if !has_avx2() {
        return (0, true);
    }
    // SAFETY: the processor has AVX2.
    unsafe {
        match element_bytes {
            // Bytes are left to the portable code.
            1 => (0, true),
            2 => pack_halves_avx2(dense, values, metadata),
            _ => pack_floats_avx2(dense, values, metadata),
        }
    }
}

pub(super) fn unpack_avx2(
    element_bytes: usize,
    values: &[u8],
    metadata: &[u8],
    out: &mut [u8],
) -> Done {
    if !has_avx2() {
        return (0, true);
    }
    // SAFETY: the processor has AVX2.
    unsafe {
        match element_bytes {
            // Bytes are left to the portable code.
            1 => (0, true),
            2 => unpack_halves_avx2(values, metadata, out),
            _ => unpack_floats_avx2(values, metadata, out),
        }
    }
}

pub(super) fn pack_avx512(
    element_bytes: usize,
    dense: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
) -> Done {
    if !has_avx512() {
        return (0, true);
    }
    // SAFETY: the processor has AVX-512 F, BW and VBMI2.
    unsafe {
        match element_bytes {
            1 => pack_bytes_avx512(dense, values, metadata),
            2 => pack_halves_avx512(dense, values, metadata),
            _ => pack_floats_avx512(dense, values, metadata),
        }
    }
}

pub(super) fn unpack_avx512(
    element_bytes: usize,
    values: &[u8],
    metadata: &[u8],
    out: &mut [u8],
) -> Done {
    if !has_avx512() {
        return (0, true);
    }
    // SAFETY: the processor has AVX-512 F, BW and VBMI2.
    unsafe {
        match element_bytes {
            1 => unpack_bytes_avx512(values, metadata, out),
            2 => unpack_halves_avx512(values, metadata, out),
            _ => unpack_floats_avx512(values, metadata, out),
        }
    }
}

/// What sixteen groups keep.
struct Choice {
    /// One bit per element, exactly two in each legal group.
    kept: u64,
    /// One nibble per group.
    nibbles: u64,
    /// Not zero when a group has more than two values.
    too_many: u64,
}

/// `flags` has a bit for each element that is not `+0.0`. With `a b c d` the flags of a group, its
/// nibble is, from bit 0: `b & !a`, `!(a | b)`, `a & b | !(a | b) | d`, `!(a & b)`.
#[inline]
fn choose(flags: u64) -> Choice {
    let [a, b, c, d] = [flags, flags >> 1, flags >> 2, flags >> 3].map(|bits| bits & LOW);
    let (both, either) = (a & b, a | b);
    let neither = either ^ LOW;
    let nibbles = (b ^ both) | neither << 1 | (both | neither | d) << 2 | (both ^ LOW) << 3;
    // Columns 0 and 1 are kept when they hold values. Column 3 also when both are zero, and column 2
    // also unless two of the others hold values.
    let kept = flags | neither << 3 | ((both | either & d) ^ LOW) << 2;
    Choice { kept, nibbles, too_many: both & (c | d) | either & c & d }
}

/// The kept elements that sixteen nibbles name, and something that is not zero when one is illegal.
#[inline]
fn places(nibbles: u64) -> (u64, u64) {
    let [n0, n1, n2, n3] =
        [nibbles, nibbles >> 1, nibbles >> 2, nibbles >> 3].map(|bits| bits & LOW);
    let column0 = (n0 | n1) ^ LOW;
    let column1 = (n0 & !n1) | (n2 & !n3);
    let column2 = (n1 & !n0) | (n3 & !n2);
    let column3 = n2 & n3;
    // i0 < i1: the high bits decide, or are equal and the low bits do.
    let ascending = (n3 & !n1) | (!(n1 ^ n3) & n2 & !n0);
    (column0 | column1 << 1 | column2 << 2 | column3 << 3, ascending ^ LOW)
}

/// The steps of a slice, each as `N` pieces of `B` bytes.
fn steps<const B: usize, const N: usize>(bytes: &[u8]) -> &[[[u8; B]; N]] {
    bytes.as_chunks::<B>().0.as_chunks::<N>().0
}

/// As [`steps`].
fn steps_mut<const B: usize, const N: usize>(bytes: &mut [u8]) -> &mut [[[u8; B]; N]] {
    bytes.as_chunks_mut::<B>().0.as_chunks_mut::<N>().0
}

/// The metadata of the steps.
fn words(metadata: &[u8]) -> impl Iterator<Item = u64> {
    metadata.as_chunks::<META>().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn pack_bytes_avx512(dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> Done {
    let (dense, values) = (steps::<64, 1>(dense), steps_mut::<32, 1>(values));
    let mut too_many = 0;
    for ((dense, [values]), metadata) in
        dense.iter().zip(values).zip(steps_mut::<META, 1>(metadata))
    {
        fetch_ahead(dense);
        let lanes = load512(&dense[0]);
        let Choice { kept, nibbles, too_many: flaws } = choose(_mm512_test_epi8_mask(lanes, lanes));
        store256(_mm512_castsi512_si256(_mm512_maskz_compress_epi8(kept, lanes)), values);
        *metadata = [nibbles.to_le_bytes()];
        too_many |= flaws;
    }
    (dense.len() * STEP, too_many == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn unpack_bytes_avx512(values: &[u8], metadata: &[u8], out: &mut [u8]) -> Done {
    let (values, out) = (steps::<32, 1>(values), steps_mut::<64, 1>(out));
    let mut illegal = 0;
    for (([values], nibbles), [out]) in values.iter().zip(words(metadata)).zip(out) {
        let (kept, flaws) = places(nibbles);
        let lanes = _mm512_castsi256_si512(load256(values));
        store512(_mm512_maskz_expand_epi8(kept, lanes), out);
        illegal |= flaws;
    }
    (values.len() * STEP, illegal == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn pack_halves_avx512(dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> Done {
    let (dense, values) = (steps::<64, 2>(dense), steps_mut::<32, 2>(values));
    let mut too_many = 0;
    for ((dense, values), metadata) in dense.iter().zip(values).zip(steps_mut::<META, 1>(metadata))
    {
        fetch_ahead(dense);
        let [low, high] = [load512(&dense[0]), load512(&dense[1])];
        let flags = u64::from(_mm512_test_epi16_mask(low, low))
            | u64::from(_mm512_test_epi16_mask(high, high)) << 32;
        let Choice { kept, nibbles, too_many: flaws } = choose(flags);
        let low = _mm512_maskz_compress_epi16(kept as u32, low);
        let high = _mm512_maskz_compress_epi16((kept >> 32) as u32, high);
        store256(_mm512_castsi512_si256(low), &mut values[0]);
        store256(_mm512_castsi512_si256(high), &mut values[1]);
        *metadata = [nibbles.to_le_bytes()];
        too_many |= flaws;
    }
    (dense.len() * STEP, too_many == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn unpack_halves_avx512(values: &[u8], metadata: &[u8], out: &mut [u8]) -> Done {
    let (values, out) = (steps::<32, 2>(values), steps_mut::<64, 2>(out));
    let mut illegal = 0;
    for ((values, nibbles), out) in values.iter().zip(words(metadata)).zip(out) {
        let (kept, flaws) = places(nibbles);
        let low = _mm512_castsi256_si512(load256(&values[0]));
        let high = _mm512_castsi256_si512(load256(&values[1]));
        store512(_mm512_maskz_expand_epi16(kept as u32, low), &mut out[0]);
        store512(_mm512_maskz_expand_epi16((kept >> 32) as u32, high), &mut out[1]);
        illegal |= flaws;
    }
    (values.len() * STEP, illegal == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn pack_floats_avx512(dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> Done {
    let (dense, values) = (steps::<64, 4>(dense), steps_mut::<32, 4>(values));
    let mut too_many = 0;
    for ((dense, values), metadata) in dense.iter().zip(values).zip(steps_mut::<META, 1>(metadata))
    {
        fetch_ahead(dense);
        let mut flags = 0;
        for (quarter, lanes) in dense.iter().enumerate() {
            let lanes = load512(lanes);
            flags |= u64::from(_mm512_test_epi32_mask(lanes, lanes)) << (16 * quarter);
        }
        let Choice { kept, nibbles, too_many: flaws } = choose(flags);
        for (quarter, (lanes, values)) in dense.iter().zip(values).enumerate() {
            let kept = (kept >> (16 * quarter)) as u16;
            let lanes = _mm512_maskz_compress_epi32(kept, load512(lanes));
            store256(_mm512_castsi512_si256(lanes), values);
        }
        *metadata = [nibbles.to_le_bytes()];
        too_many |= flaws;
    }
    (dense.len() * STEP, too_many == 0)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
fn unpack_floats_avx512(values: &[u8], metadata: &[u8], out: &mut [u8]) -> Done {
    let (values, out) = (steps::<32, 4>(values), steps_mut::<64, 4>(out));
    let mut illegal = 0;
    for ((values, nibbles), out) in values.iter().zip(words(metadata)).zip(out) {
        let (kept, flaws) = places(nibbles);
        for (quarter, (values, out)) in values.iter().zip(out).enumerate() {
            let lanes = _mm512_castsi256_si512(load256(values));
            store512(_mm512_maskz_expand_epi32((kept >> (16 * quarter)) as u16, lanes), out);
        }
        illegal |= flaws;
    }
    (values.len() * STEP, illegal == 0)
}

#[target_feature(enable = "avx2")]
fn pack_halves_avx2(dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> Done {
    let (dense, values) = (steps::<16, 8>(dense), steps_mut::<8, 8>(values));
    let mut too_many = 0;
    for ((dense, values), metadata) in dense.iter().zip(values).zip(steps_mut::<META, 1>(metadata))
    {
        fetch_ahead(dense);
        let mut zeros = 0;
        for (quarter, lanes) in dense.as_chunks::<2>().0.iter().enumerate() {
            // Two registers of 8 lanes become 16 bytes in order, one bit each.
            let zero = lanes.map(|lanes| _mm_cmpeq_epi16(load128(&lanes), _mm_setzero_si128()));
            let bits = _mm_movemask_epi8(_mm_packs_epi16(zero[0], zero[1]));
            zeros |= u64::from(bits as u16) << (16 * quarter);
        }
        let Choice { nibbles, too_many: flaws, .. } = choose(!zeros);
        let bytes = nibbles.to_le_bytes();
        for ((lanes, values), byte) in dense.iter().zip(values).zip(bytes) {
            let control = load64(&PACK_HALVES[usize::from(byte)]);
            store64(_mm_shuffle_epi8(load128(lanes), control), values);
        }
        *metadata = [bytes];
        too_many |= flaws;
    }
    (dense.len() * STEP, too_many == 0)
}

#[target_feature(enable = "avx2")]
fn unpack_halves_avx2(values: &[u8], metadata: &[u8], out: &mut [u8]) -> Done {
    let (values, out) = (steps::<8, 8>(values), steps_mut::<16, 8>(out));
    let mut illegal = 0;
    for ((values, nibbles), out) in values.iter().zip(words(metadata)).zip(out) {
        for ((values, out), byte) in values.iter().zip(out).zip(nibbles.to_le_bytes()) {
            let control = load128(&UNPACK_HALVES[usize::from(byte)]);
            store128(_mm_shuffle_epi8(load64(values), control), out);
        }
        illegal |= places(nibbles).1;
    }
    (values.len() * STEP, illegal == 0)
}

#[target_feature(enable = "avx2")]
fn pack_floats_avx2(dense: &[u8], values: &mut [u8], metadata: &mut [u8]) -> Done {
    let (dense, values) = (steps::<16, 16>(dense), steps_mut::<8, 16>(values));
    let mut too_many = 0;
    for ((dense, values), metadata) in dense.iter().zip(values).zip(steps_mut::<META, 1>(metadata))
    {
        fetch_ahead(dense);
        let mut zeros = 0;
        for (group, lanes) in dense.iter().enumerate() {
            let zero = _mm_cmpeq_epi32(load128(lanes), _mm_setzero_si128());
            zeros |= (_mm_movemask_ps(_mm_castsi128_ps(zero)) as u64) << (4 * group);
        }
        let Choice { nibbles, too_many: flaws, .. } = choose(!zeros);
        for (group, (lanes, values)) in dense.iter().zip(values).enumerate() {
            let nibble = (nibbles >> (4 * group)) as usize & 0xF;
            store64(_mm_shuffle_epi8(load128(lanes), load64(&PACK_FLOATS[nibble])), values);
        }
        *metadata = [nibbles.to_le_bytes()];
        too_many |= flaws;
    }
    (dense.len() * STEP, too_many == 0)
}

#[target_feature(enable = "avx2")]
fn unpack_floats_avx2(values: &[u8], metadata: &[u8], out: &mut [u8]) -> Done {
    let (values, out) = (steps::<8, 16>(values), steps_mut::<16, 16>(out));
    let mut illegal = 0;
    for ((values, nibbles), out) in values.iter().zip(words(metadata)).zip(out) {
        for (group, (values, out)) in values.iter().zip(out).enumerate() {
            let nibble = (nibbles >> (4 * group)) as usize & 0xF;
            store128(_mm_shuffle_epi8(load64(values), load128(&UNPACK_FLOATS[nibble])), out);
        }
        illegal |= places(nibbles).1;
    }
    (values.len() * STEP, illegal == 0)
}

/// Bytes that a shuffle takes from four dense 16-bit elements for each nibble, for two groups.
const PACK_HALVES: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut at = 0;
    while at < 256 * 8 {
        let (byte, to) = (at / 8, at % 8);
        let nibble = if to < 4 { byte & 0xF } else { byte >> 4 };
        table[byte][to] = (to / 4 * 8) as u8 + source_when_packing(nibble, to % 4, 2);
        at += 1;
    }
    table
};

/// The inverse: for each byte of eight dense 16-bit elements, which of four kept ones it is.
const UNPACK_HALVES: [[u8; 16]; 256] = {
    let mut table = [[0; 16]; 256];
    let mut at = 0;
    while at < 256 * 16 {
        let (byte, to) = (at / 16, at % 16);
        let nibble = if to < 8 { byte & 0xF } else { byte >> 4 };
        let source = source_when_unpacking(nibble, to % 8, 2);
        table[byte][to] = if source == NONE { NONE } else { (to / 8 * 4) as u8 + source };
        at += 1;
    }
    table
};

/// As [`PACK_HALVES`], one group of 32-bit elements.
const PACK_FLOATS: [[u8; 8]; 16] = {
    let mut table = [[0; 8]; 16];
    let mut at = 0;
    while at < 16 * 8 {
        table[at / 8][at % 8] = source_when_packing(at / 8, at % 8, 4);
        at += 1;
    }
    table
};

/// As [`UNPACK_HALVES`], one group of 32-bit elements.
const UNPACK_FLOATS: [[u8; 16]; 16] = {
    let mut table = [[0; 16]; 16];
    let mut at = 0;
    while at < 16 * 16 {
        table[at / 16][at % 16] = source_when_unpacking(at / 16, at % 16, 4);
        at += 1;
    }
    table
};

/// A shuffle writes zero there.
const NONE: u8 = 0x80;

/// Byte of the dense group that byte `to` of its kept pair comes from.
const fn source_when_packing(nibble: usize, to: usize, element_bytes: usize) -> u8 {
    let column = if to < element_bytes { nibble & 3 } else { nibble >> 2 };
    (column * element_bytes + to % element_bytes) as u8
}

/// Byte of the kept pair that byte `to` of the dense group comes from.
const fn source_when_unpacking(nibble: usize, to: usize, element_bytes: usize) -> u8 {
    let (column, within) = (to / element_bytes, to % element_bytes);
    if column == nibble & 3 {
        within as u8
    } else if column == nibble >> 2 {
        (element_bytes + within) as u8
    } else {
        NONE
    }
}

/// How far before its use input is asked for: the best of 1 to 8 KiB on a Xeon with AVX-512. The
/// processor's own prefetching stops at the end of a page.
const AHEAD_BYTES: usize = 1024;

/// Asks for the step that lies [`AHEAD_BYTES`] further on.
#[inline]
fn fetch_ahead<const B: usize, const N: usize>(step: &[[u8; B]; N]) {
    let bytes = step.as_flattened();
    for line in (0..bytes.len()).step_by(64) {
        let ahead = bytes.as_ptr().wrapping_add(AHEAD_BYTES + line);
        // SAFETY: a prefetch reads nothing and never faults, wherever the pointer leads.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
}

#[target_feature(enable = "avx2")]
fn load64(bytes: &[u8; 8]) -> __m128i {
    // SAFETY: reads 8 bytes, at any alignment.
    unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: reads 16 bytes, at any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: reads 32 bytes, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load512(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: reads 64 bytes, at any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store64(lanes: __m128i, out: &mut [u8; 8]) {
    // SAFETY: writes 8 bytes, at any alignment.
    unsafe { _mm_storel_epi64(out.as_mut_ptr().cast(), lanes) }
}

#[target_feature(enable = "avx2")]
fn store128(lanes: __m128i, out: &mut [u8; 16]) {
    // SAFETY: writes 16 bytes, at any alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), lanes) }
}

#[target_feature(enable = "avx512f")]
fn store256(lanes: __m256i, out: &mut [u8; 32]) {
    // SAFETY: writes 32 bytes, at any alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), lanes) }
}

#[target_feature(enable = "avx512f")]
fn store512(lanes: __m512i, out: &mut [u8; 64]) {
    // SAFETY: writes 64 bytes, at any alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), lanes) }
}
