//! The functions on bare slices: 2:4 and n:m matrices, of elements and of 4-bit codes. Slices of any
//! length are taken or refused, and what is encoded decodes to the same.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{
    DType,
    encoding::{
        MatrixShape,
        nm::{self, Pattern},
        sparse24,
    },
};
use sparsepack_formats_fuzz::fill;

/// Bytes for a slice that should have `len`, and mostly has.
fn slice(u: &mut Unstructured<'_>, len: usize) -> Result<Vec<u8>> {
    if u.ratio(1, 8)? { u.arbitrary() } else { fill(u, len) }
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let matrix = if u.ratio(1, 8)? {
        MatrixShape { rows: u.arbitrary()?, cols: u.arbitrary()? }
    } else {
        MatrixShape { rows: u.int_in_range(0..=5)?, cols: 4 * u.int_in_range(0..=33)? }
    };
    let MatrixShape { rows, cols } = matrix;
    let small = rows < 100 && cols < 1000;
    let (rows, cols) = if small { (rows, cols) } else { (0, 0) };
    let range = if u.arbitrary()? { 0..matrix.rows } else { u.arbitrary()?..u.arbitrary()? };
    let dtype = u.choose_iter(DType::ALL)?;
    let bytes = rows * cols * dtype.size_bytes();
    let (values, metadata) = (slice(u, bytes / 2)?, slice(u, rows * cols.div_ceil(8))?);
    let (mut out, mut out_f32) = (slice(u, bytes)?, vec![0.0; rows * cols]);

    let mut decoded = vec![];
    let whole =
        sparse24::decode("w", dtype, matrix, &values, &metadata, range.clone(), &mut decoded);
    let into =
        sparse24::decode_into("w", dtype, matrix, &values, &metadata, range.clone(), &mut out);
    if whole.is_ok() && into.is_ok() {
        assert_eq!(decoded, out);
    }
    let _ =
        sparse24::decode_f32("w", dtype, matrix, &values, &metadata, range.clone(), &mut out_f32);
    let dense = slice(u, bytes)?;
    let (mut packed, mut nibbles) = (vec![], vec![]);
    let encoded = sparse24::encode("w", dtype, matrix, &dense, &mut packed, &mut nibbles);
    let (mut packed_into, mut nibbles_into) = (values, metadata);
    let into =
        sparse24::encode_into("w", dtype, matrix, &dense, &mut packed_into, &mut nibbles_into);
    if into.is_ok() {
        assert_eq!((&packed, &nibbles), (&packed_into, &nibbles_into));
    }
    if encoded.is_ok() {
        let mut back = vec![];
        sparse24::decode("w", dtype, matrix, &packed, &nibbles, 0..matrix.rows, &mut back)
            .expect("just encoded");
        assert_eq!(back, dense);
    }

    let (values, mask) = (packed_into, nibbles_into);
    let pattern = Pattern { n: u.int_in_range(0..=17)?, m: u.int_in_range(0..=17)? };
    let codes = slice(u, rows * cols.div_ceil(2))?;
    let mut back = vec![];
    let _ = sparse24::decode_nibbles("w", matrix, &values, &mask, range.clone(), &mut back);
    let _ = nm::decode_nibbles("w", pattern, matrix, &values, &mask, range, &mut back);
    let (mut values, mut mask) = (vec![], vec![]);
    if sparse24::encode_nibbles("w", matrix, &codes, &mut values, &mut mask).is_ok() {
        let mut back = vec![];
        sparse24::decode_nibbles("w", matrix, &values, &mask, 0..matrix.rows, &mut back)
            .expect("just encoded");
        assert_eq!(back, codes);
    }
    let (mut values, mut mask) = (vec![], vec![]);
    if nm::encode_nibbles("w", pattern, matrix, &codes, &mut values, &mut mask).is_ok() {
        let mut back = vec![];
        nm::decode_nibbles("w", pattern, matrix, &values, &mask, 0..matrix.rows, &mut back)
            .expect("just encoded");
        assert_eq!(back, codes);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
