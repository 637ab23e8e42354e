//! ggml blocks: any bytes decode; any finite values encode or are refused for their size, to values
//! that are finite, and zero where the type promises it.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{Encoding, GgmlType, encoding::ggml};
use sparsepack_formats_fuzz::fill;

fn decode(ty: GgmlType, blocks: usize, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; blocks * ty.block_len()];
    Encoding::Ggml { ty }
        .decode_all_f32("w", &[blocks, ty.block_len()], &[bytes], &mut values)
        .expect("whole blocks");
    values
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let types: Vec<GgmlType> = GgmlType::all().filter(|ty| ty.block_len() > 1).collect();
    let ty = *u.choose(&types)?;
    let blocks = u.int_in_range(0..=4)?;
    let values = if u.arbitrary()? {
        decode(ty, blocks, &fill(u, blocks * ty.block_bytes())?)
    } else {
        let bytes = fill(u, 4 * blocks * ty.block_len())?;
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut encoded = vec![];
    let result = ggml::encode("w", ty, ty.block_len(), 0, &bytes, &mut encoded);
    let finite = values.iter().all(|value| value.is_finite());
    assert!(finite || result.is_err(), "{ty} took what is not finite");
    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    // No scale is larger than the largest magnitude.
    assert!(!finite || largest >= 65504.0 || result.is_ok(), "{ty}: {result:?}");
    if result.is_err() {
        assert!(encoded.is_empty());
        return Ok(());
    }
    let again = decode(ty, blocks, &encoded);
    for (value, again) in values.iter().zip(&again) {
        assert!(again.is_finite(), "{ty}: {value:e} became {again:e}");
        assert!(*value != 0.0 || *again == 0.0 || !ty.keeps_zeros(), "{ty}: 0 became {again:e}");
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
