//! Components of any encoding, of the right lengths or not: decoding never panics, and what decodes
//! survives being encoded again.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{Encoding, encoding::MatrixShape};
use sparsepack_formats_fuzz::{check_decoding, encode, encoding, parts, shape};

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let (encoding, shape) = (encoding(u)?, shape(u)?);
    let (start, end, room) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary::<u16>()?);
    let parts: Vec<Vec<u8>> = match parts(u, "w.weight", encoding, &shape)? {
        Some(parts) if u.ratio(7, 8)? => parts,
        _ => u.arbitrary()?,
    };
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    // Rows and a buffer that nobody asked for.
    let _ = encoding.decode_dense("w.weight", &shape, &parts, start..end, &mut vec![]);
    let mut out = vec![0.0; room.into()];
    let _ = encoding.decode_f32("w.weight", &shape, &parts, start..end, &mut out);
    if check_decoding("w.weight", encoding, &shape, &parts) && !encoding.is_lossy() {
        encode_again(encoding, &shape, &parts);
    }
    Ok(())
}

fn encode_again(encoding: Encoding, shape: &[usize], parts: &[&[u8]]) {
    let rows = MatrixShape::of(shape).rows;
    let (mut dense, mut again) = (vec![], vec![]);
    encoding.decode_dense("w.weight", shape, parts, 0..rows, &mut dense).expect("decoded before");
    let encoded = encode("w.weight", encoding, shape, &dense, dense.len())
        .expect("decoded values fit the encoding");
    let encoded: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
    encoding.decode_dense("w.weight", shape, &encoded, 0..rows, &mut again).expect("just encoded");
    assert_eq!(dense, again, "{encoding} {shape:?}");
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
