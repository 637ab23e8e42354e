//! Codes of 2 to 8 bits, one after the other in a stream of bytes.
//!
//! Code `i` has bits `i·b` to `i·b + b - 1` of the stream; bit `k` of the stream is bit `k % 8` (0 is
//! the least significant) of byte `k / 8`. So codes of 8 bits are bytes, and of two codes of 4 bits in
//! a byte the first is in the low nibble.

/// Bytes of a stream of `codes` codes.
pub(super) fn bytes(codes: usize, bits: u8) -> usize {
    (codes * usize::from(bits)).div_ceil(8)
}

/// 32-bit words of a stream of `codes` codes.
pub(super) fn words(codes: usize, bits: u8) -> usize {
    (codes * usize::from(bits)).div_ceil(32)
}

/// Bytes that `codes` codes fill whole.
pub(super) fn whole_bytes(codes: u64, bits: u8) -> usize {
    // No more than the stream of a tensor has.
    (codes * u64::from(bits) / 8) as usize
}

/// Appends codes; what does not fill a byte yet waits for the next.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct BitWriter {
    waiting: u16,
    /// Bits in `waiting`, fewer than 8.
    filled: u32,
}

impl BitWriter {
    /// Appends the low `bits` bits of each code.
    pub(super) fn write(&mut self, codes: &[u8], bits: u8, out: &mut Vec<u8>) {
        if bits == 8 && self.filled == 0 {
            out.extend_from_slice(codes);
            return;
        }
        out.reserve(bytes(codes.len(), bits));
        for &code in codes {
            self.waiting |= (u16::from(code) & low(bits)) << self.filled;
            self.filled += u32::from(bits);
            if self.filled >= 8 {
                out.push(self.waiting as u8);
                self.waiting >>= 8;
                self.filled -= 8;
            }
        }
    }

    /// Appends the last byte, filled with zeros, if there is one.
    pub(super) fn finish(self, out: &mut Vec<u8>) {
        if self.filled > 0 {
            out.push(self.waiting as u8);
        }
    }
}

/// Appends a row of codes that starts and ends at whole bytes.
pub(super) fn pack(codes: &[u8], bits: u8, out: &mut Vec<u8>) {
    let mut writer = BitWriter::default();
    writer.write(codes, bits, out);
    writer.finish(out);
}

/// Reads codes from code `first` on, as many as `out` has room for; they exist.
pub(super) fn unpack(packed: &[u8], first: usize, bits: u8, out: &mut [u8]) {
    if bits == 8 {
        let len = out.len();
        out.copy_from_slice(&packed[first..first + len]);
        return;
    }
    let mut at = first * usize::from(bits);
    for code in out {
        let window = match &packed[at / 8..] {
            [low, high, ..] => u16::from_le_bytes([*low, *high]),
            [last] => u16::from(*last),
            [] => 0,
        };
        *code = (window >> (at % 8) & low(bits)) as u8;
        at += usize::from(bits);
    }
}

/// The number that the low `bits` bits of a code are in two's complement.
pub(super) fn sign_extend(code: u8, bits: u8) -> i8 {
    let unused = 8 - bits;
    (code << unused).cast_signed() >> unused
}

/// Whether every bit behind the last of `codes` codes is 0.
pub(super) fn is_padded(packed: &[u8], codes: usize, bits: u8) -> bool {
    let used = codes * usize::from(bits);
    let rest = &packed[used / 8..];
    match (rest, used % 8) {
        ([], _) => true,
        (rest, 0) => rest.iter().all(|&byte| byte == 0),
        ([last, rest @ ..], used) => last >> used == 0 && rest.iter().all(|&byte| byte == 0),
    }
}

fn low(bits: u8) -> u16 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn codes_of_three_bits_cross_bytes() {
        let mut packed = vec![];
        pack(&[1, 2, 3, 4, 5, 6, 7], 3, &mut packed);
        // 0b111_110_101_100_011_010_001
        assert_eq!(packed, [0b1101_0001, 0b0101_1000, 0b0001_1111]);
        assert!(is_padded(&packed, 7, 3));
        assert!(!is_padded(&packed, 6, 3));
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(
            bits in 1..=8u8,
            codes in proptest::collection::vec(any::<u8>(), 0..70),
            cut in 0..70usize,
        ) {
            let codes: Vec<u8> = codes.iter().map(|code| code & low(bits) as u8).collect();
            let cut = cut.min(codes.len());
            let mut packed = vec![];
            pack(&codes, bits, &mut packed);
            prop_assert_eq!(packed.len(), bytes(codes.len(), bits));
            prop_assert!(is_padded(&packed, codes.len(), bits));
            let mut back = vec![0; codes.len() - cut];
            unpack(&packed, cut, bits, &mut back);
            prop_assert_eq!(&back, &codes[cut..]);
            // The same stream in two pieces.
            let (mut writer, mut pieces) = (BitWriter::default(), vec![]);
            writer.write(&codes[..cut], bits, &mut pieces);
            writer.write(&codes[cut..], bits, &mut pieces);
            writer.finish(&mut pieces);
            prop_assert_eq!(pieces, packed);
        }

        #[test]
        fn two_s_complement_is_undone(code: i8, bits in 2..=8u8) {
            let half = 1i16 << (bits - 1);
            let code = (i16::from(code).rem_euclid(2 * half) - half) as i8;
            prop_assert_eq!(sign_extend(code.cast_unsigned() & low(bits) as u8, bits), code);
        }
    }
}
