//! The rows of a 2:4 matrix without special instructions: what the vector kernels must equal.

use super::PAD;

/// Marks a group of three or four values in [`NIBBLES`].
const TOO_MANY: u8 = 0x80;

/// Nibble by which of the four columns (bit 0 is column 0) hold values.
const NIBBLES: [u8; 16] = [
    0xE, 0x8, 0x9, 0x4, // ----, 0, 1, 01
    0xE, 0x8, 0x9, TOO_MANY, // 2, 02, 12, 012
    0xE, 0xC, 0xD, TOO_MANY, // 3, 03, 13, 013
    0xE, TOO_MANY, TOO_MANY, TOO_MANY, // 23, 023, 123, 0123
];

/// 1 for each metadata byte with a nibble that is not legal, else 0.
const ILLEGAL: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = !(is_legal(byte as u8 & 0xF) && is_legal(byte as u8 >> 4)) as u8;
        byte += 1;
    }
    table
};

pub(super) const fn is_legal(nibble: u8) -> bool {
    nibble & 3 < nibble >> 2
}

/// [`Kernel::pack`](super::Kernel::pack) of matching slices.
pub(super) fn pack(
    element_bytes: usize,
    dense: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
) -> bool {
    match element_bytes {
        1 => encode_row::<4, 2>(dense, values, metadata, group_of_bytes),
        2 => encode_row::<8, 4>(dense, values, metadata, group_of_halves),
        _ => encode_row::<16, 8>(dense, values, metadata, group_of_floats),
    }
}

/// [`Kernel::unpack`](super::Kernel::unpack) of matching slices.
pub(super) fn unpack(element_bytes: usize, values: &[u8], metadata: &[u8], out: &mut [u8]) -> bool {
    match element_bytes {
        1 => decode_row::<4, 2>(values, metadata, out, expand_bytes),
        2 => decode_row::<8, 4>(values, metadata, out, expand_halves),
        _ => decode_row::<16, 8>(values, metadata, out, expand_floats),
    }
}

/// Packs one row; `GROUP` is the bytes of four elements and `KEPT` the bytes of two. False when a
/// group has more than two values.
fn encode_row<const GROUP: usize, const KEPT: usize>(
    dense: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
    pack: impl Fn([u8; GROUP]) -> ([u8; KEPT], u8),
) -> bool {
    let (pairs, odd) = {
        let (groups, _) = dense.as_chunks::<GROUP>();
        groups.as_chunks::<2>()
    };
    let (kept, _) = values.as_chunks_mut::<KEPT>();
    let (kept_pairs, kept_odd) = kept.as_chunks_mut::<2>();
    let mut flaws = 0;
    for (([low, high], kept), byte) in pairs.iter().zip(kept_pairs).zip(&mut *metadata) {
        let (low, low_nibble) = pack(*low);
        let (high, high_nibble) = pack(*high);
        *kept = [low, high];
        *byte = low_nibble | high_nibble << 4;
        flaws |= low_nibble | high_nibble;
    }
    if let ([group], [kept], Some(byte)) = (odd, kept_odd, metadata.last_mut()) {
        let (values, nibble) = pack(*group);
        *kept = values;
        *byte = nibble | PAD << 4;
        flaws |= nibble;
    }
    flaws & TOO_MANY == 0
}

/// Keeps two of four bytes.
#[inline]
fn group_of_bytes(group: [u8; 4]) -> ([u8; 2], u8) {
    let flags = (0..4).fold(0, |flags, i| flags | usize::from(group[i] != 0) << i);
    let nibble = NIBBLES[flags];
    ([group[usize::from(nibble & 3)], group[usize::from(nibble >> 2 & 3)]], nibble)
}

/// Keeps two of four 16-bit lanes.
#[inline]
fn group_of_halves(group: [u8; 8]) -> ([u8; 4], u8) {
    const LOW_BITS: u64 = 0x7FFF_7FFF_7FFF_7FFF;
    // Moves bit 16 i to bit 48 + i: the four products do not carry into each other.
    const GATHER: u64 = 1 << 48 | 1 << 33 | 1 << 18 | 1 << 3;
    let lanes = u64::from_le_bytes(group);
    // The top bit of a lane becomes set exactly when the lane is not zero.
    let nonzero = (((lanes & LOW_BITS) + LOW_BITS) | lanes) & !LOW_BITS;
    let flags = ((nonzero >> 15).wrapping_mul(GATHER) >> 48) & 0xF;
    let nibble = NIBBLES[flags as usize];
    let (first, second) = (nibble << 4 & 0x30, nibble << 2 & 0x30);
    let kept = (lanes >> first & 0xFFFF) as u32 | ((lanes >> second) as u32) << 16;
    (kept.to_le_bytes(), nibble)
}

/// Keeps two of four 32-bit lanes.
#[inline]
fn group_of_floats(group: [u8; 16]) -> ([u8; 8], u8) {
    let (lanes, _) = group.as_chunks::<4>();
    let lanes: [u32; 4] = std::array::from_fn(|i| u32::from_le_bytes(lanes[i]));
    let flags = (0..4).fold(0, |flags, i| flags | usize::from(lanes[i] != 0) << i);
    let nibble = NIBBLES[flags];
    let (first, second) = (lanes[usize::from(nibble & 3)], lanes[usize::from(nibble >> 2 & 3)]);
    ((u64::from(first) | u64::from(second) << 32).to_le_bytes(), nibble)
}

/// Expands one row; false when a nibble is not legal or the padding is not [`PAD`].
fn decode_row<const GROUP: usize, const KEPT: usize>(
    values: &[u8],
    metadata: &[u8],
    out: &mut [u8],
    expand: impl Fn([u8; KEPT], u8) -> [u8; GROUP],
) -> bool {
    let (kept, _) = values.as_chunks::<KEPT>();
    let (kept_pairs, kept_odd) = kept.as_chunks::<2>();
    let (groups, _) = out.as_chunks_mut::<GROUP>();
    let (pairs, odd) = groups.as_chunks_mut::<2>();
    let mut flaws = 0;
    for (([low, high], out), &byte) in kept_pairs.iter().zip(pairs).zip(metadata) {
        *out = [expand(*low, byte & 0xF), expand(*high, byte >> 4)];
        flaws |= ILLEGAL[usize::from(byte)];
    }
    if let ([kept], [out], Some(&byte)) = (kept_odd, odd, metadata.last()) {
        *out = expand(*kept, byte & 0xF);
        flaws |= ILLEGAL[usize::from(byte)] | u8::from(byte >> 4 != PAD);
    }
    flaws == 0
}

/// Puts two bytes at their columns.
#[inline]
fn expand_bytes([first, second]: [u8; 2], nibble: u8) -> [u8; 4] {
    (u32::from(first) << (8 * (nibble & 3)) | u32::from(second) << (8 * (nibble >> 2)))
        .to_le_bytes()
}

/// Puts two 16-bit values at their columns.
#[inline]
fn expand_halves(kept: [u8; 4], nibble: u8) -> [u8; 8] {
    let kept = u64::from(u32::from_le_bytes(kept));
    let (first, second) = (kept & 0xFFFF, kept >> 16);
    (first << (16 * (nibble & 3)) | second << (16 * (nibble >> 2))).to_le_bytes()
}

/// Puts two 32-bit values at their columns.
#[inline]
fn expand_floats(kept: [u8; 8], nibble: u8) -> [u8; 16] {
    let kept = u128::from(u64::from_le_bytes(kept));
    let (first, second) = (kept & 0xFFFF_FFFF, kept >> 32);
    (first << (32 * (nibble & 3)) | second << (32 * (nibble >> 2))).to_le_bytes()
}
