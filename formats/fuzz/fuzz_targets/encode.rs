//! Dense rows of any values: what an encoding accepts decodes to the same bits, however many rows it
//! is given at a time. Codes that an encoding accepts decode.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::encoding::MatrixShape;
use sparsepack_formats_fuzz::{check_decoding, dense, encode, encoding, quantized, shape};

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let (encoding, shape) = (encoding(u)?, shape(u)?);
    let width = encoding.value_dtype().size_bytes();
    let MatrixShape { rows, cols } = MatrixShape::of(&shape);
    if encoding.is_quantized() {
        if let Some(Ok(parts)) = quantized(u, "w.weight", encoding, &shape)? {
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            assert!(check_decoding("w.weight", encoding, &shape, &parts), "just encoded");
        }
        return Ok(());
    }
    let Some(dense) = dense(u, encoding, &shape)? else { return Ok(()) };
    let row_bytes = cols * width;
    let whole = encode("w.weight", encoding, &shape, &dense, dense.len());
    let by_rows = encode("w.weight", encoding, &shape, &dense, row_bytes * u.int_in_range(1..=5)?);
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
