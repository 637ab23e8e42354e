//! No bytes make the reader panic, and no prefix of a file is taken for the whole.

use proptest::prelude::*;
use sparsepack_formats::CheckpointReader;

use crate::builder::every_kind;
use crate::read;

/// Reads the file and, if its header is accepted, every tensor.
fn must_not_panic(bytes: &[u8]) {
    if let Ok(reader) = read(bytes) {
        for info in reader.tensors() {
            let _ = reader.read_f32(&info.name);
        }
    }
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = every_kind().bytes();
    read(&bytes).unwrap();
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn a_flipped_bit_in_any_byte_of_the_header_is_survived() {
    let header = every_kind().header().len();
    let mut bytes = every_kind().bytes();
    for at in 0..header {
        // Low and high bits by turns: small and large errors.
        let flip = 1 << (at % 8);
        bytes[at] ^= flip;
        must_not_panic(&bytes);
        bytes[at] ^= flip;
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_after_the_version_are_survived(
        tail in prop::collection::vec(any::<u8>(), 0..200)
    ) {
        must_not_panic(&[&b"GGUF\x03\0\0\0"[..], &tail].concat());
    }

    /// Mostly zero bytes get past the length checks more often.
    #[test]
    fn sparse_bytes_after_small_counts_are_survived(
        counts in prop::array::uniform2(0u64..3),
        tail in prop::collection::vec(prop_oneof![6 => Just(0u8), 2 => 1u8..13, 1 => any::<u8>()], 0..300)
    ) {
        let [tensors, pairs] = counts.map(u64::to_le_bytes);
        must_not_panic(&[&b"GGUF\x03\0\0\0"[..], &tensors, &pairs, &tail].concat());
    }

    #[test]
    fn random_bit_flips_are_survived(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6)
    ) {
        let mut bytes = every_kind().bytes();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        must_not_panic(&bytes);
    }
}
