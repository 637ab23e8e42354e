//! Rows of 4-bit codes: two in a byte, the even column in the low nibble.
//!
//! Rows start at whole bytes, so an odd row has an unused high nibble, which is 0.

use crate::{FormatError, Result};

/// Bytes of a row of `cols` codes.
pub(super) fn stride(cols: usize) -> usize {
    cols.div_ceil(2)
}

/// The codes of rows of `cols`, one a byte. The length of `packed` has been checked.
///
/// # Errors
/// [`FormatError::Encoding`] naming the row, counted from `first_row`, whose unused nibble is not 0.
pub(super) fn unpack(name: &str, packed: &[u8], cols: usize, first_row: usize) -> Result<Vec<u8>> {
    let mut codes = Vec::with_capacity(2 * packed.len());
    for (row, bytes) in packed.chunks_exact(stride(cols).max(1)).enumerate() {
        let (pairs, odd) = bytes.split_at(cols / 2);
        codes.extend(pairs.iter().flat_map(|byte| [byte & 0xF, byte >> 4]));
        if let [last] = odd {
            if last >> 4 != 0 {
                return Err(FormatError::Encoding {
                    name: name.to_owned(),
                    what: format!(
                        "row {}: the unused nibble is {:#x}, expected 0x0",
                        first_row + row,
                        last >> 4
                    ),
                });
            }
            codes.push(*last);
        }
    }
    Ok(codes)
}

/// Appends rows of `cols` codes below 16, given one a byte, packed.
pub(super) fn pack(codes: &[u8], cols: usize, out: &mut Vec<u8>) {
    for row in codes.chunks_exact(cols.max(1)) {
        let (pairs, odd) = row.as_chunks::<2>();
        out.extend(pairs.iter().map(|[low, high]| low | high << 4));
        out.extend(odd);
    }
}
