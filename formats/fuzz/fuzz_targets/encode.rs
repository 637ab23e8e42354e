//! Dense rows of any values: what an encoding accepts decodes to the same bits, however many rows it
//! is given at a time.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{Encoder, Encoding, encoding::MatrixShape};
use sparsepack_formats_fuzz::{check_decoding, encoding, fill, shape};

fn encode(
    encoding: Encoding,
    shape: &[usize],
    dense: &[u8],
    bytes_at_once: usize,
) -> sparsepack_formats::Result<Vec<Vec<u8>>> {
    let mut parts = vec![vec![]; encoding.components("w.weight", shape)?.len()];
    let mut encoder = Encoder::new(encoding, "w.weight", shape)?;
    for rows in dense.chunks(bytes_at_once.max(1)) {
        for (part, bytes) in parts.iter_mut().zip(encoder.rows(rows)?) {
            part.extend(bytes);
        }
    }
    for (part, bytes) in parts.iter_mut().zip(encoder.finish()?) {
        part.extend(bytes);
    }
    Ok(parts)
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let (encoding, shape) = (encoding(u)?, shape(u)?);
    let dtype = encoding.value_dtype();
    let width = dtype.size_bytes();
    let MatrixShape { rows, cols } = MatrixShape::of(&shape);
    let Some(len) = rows.checked_mul(cols).filter(|&n| n <= 1 << 14) else { return Ok(()) };
    let mut dense = fill(u, len * width)?;
    // Zeros by a mask of one to 32 elements, so that sparse encodings have something to hold.
    let mask: u32 = u.arbitrary()?;
    let period = u.int_in_range(1..=32)?;
    for (index, element) in dense.chunks_mut(width).enumerate() {
        if mask >> (index % period) & 1 == 0 {
            element.fill(0);
        }
    }
    let row_bytes = cols * width;
    let whole = encode(encoding, &shape, &dense, dense.len());
    let by_rows = encode(encoding, &shape, &dense, row_bytes * u.int_in_range(1..=5)?);
    let (Ok(whole), Ok(by_rows)) = (&whole, &by_rows) else {
        assert_eq!(
            whole.map_err(|error| error.to_string()),
            by_rows.map_err(|error| error.to_string()),
        );
        return Ok(());
    };
    assert_eq!(whole, by_rows, "{encoding} {shape:?}");
    let parts: Vec<&[u8]> = whole.iter().map(Vec::as_slice).collect();
    assert!(check_decoding("w.weight", encoding, &shape, &parts), "just encoded");
    if !encoding.is_lossy() {
        let mut decoded = vec![];
        let result = encoding.decode_dense("w.weight", &shape, &parts, 0..rows, &mut decoded);
        result.expect("decoded before");
        assert_eq!(decoded, dense, "{encoding} {shape:?}");
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
