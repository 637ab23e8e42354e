//! Values to blocks: the bytes are ggml's, zeros survive where the table says so, and what cannot
//! be stored is refused.

use proptest::prelude::*;
use safetensors::SafeTensors;
use sparsepack_formats::{Encoder, Encoding, FormatError, GgmlType, Result};

use crate::fixture;

fn quant_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|ty| ty.block_len() > 1)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// One row of values.
fn encode(ty: GgmlType, values: &[f32]) -> Result<Vec<u8>> {
    let mut encoder = Encoder::new(Encoding::Ggml { ty }, "w", &[1, values.len()])?;
    let blocks = encoder.rows(&bytes(values))?.remove(0);
    encoder.finish()?;
    Ok(blocks)
}

fn decode(ty: GgmlType, blocks: &[u8], cols: usize) -> Vec<f32> {
    let mut values = vec![0.0; cols];
    Encoding::Ggml { ty }.decode_f32("w", &[1, cols], &[blocks], 0..1, &mut values).unwrap();
    values
}

#[test]
fn blocks_equal_ggml_byte_for_byte() {
    let file = std::fs::read(fixture("golden/gguf/quantize.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let input = golden.tensor("input").unwrap();
    let types: Vec<_> = quant_types().collect();
    assert_eq!(golden.len(), 1 + types.len(), "every type is recorded");
    for ty in types {
        let expected = golden.tensor(&format!("{ty}.blocks")).unwrap();
        let mut encoder = Encoder::new(Encoding::Ggml { ty }, "w", input.shape()).unwrap();
        let mut found = Vec::new();
        // Rows one by one and several at a time.
        let row = input.data().len() / input.shape()[0];
        for rows in [&input.data()[..row], &input.data()[row..3 * row], &input.data()[3 * row..]] {
            found.extend(encoder.rows(rows).unwrap().remove(0));
        }
        encoder.finish().unwrap();
        let differing: Vec<_> = (0..found.len())
            .filter(|&i| found[i] != expected.data()[i])
            .map(|i| (i / expected.shape()[1], i % expected.shape()[1]))
            .collect();
        assert_eq!(found.len(), expected.data().len());
        assert!(differing.is_empty(), "{ty}: (row, byte) {differing:?}");
    }
}

#[test]
fn the_example_of_the_format_description() {
    let mut values = [0.0; 32];
    values[..3].copy_from_slice(&[1.27, -1.0, 0.5]);
    let cases: [(_, &[u8], _, _, [f32; 4]); 4] = [
        (
            GgmlType::Q8_0,
            &[0x1f, 0x21, 0x7f, 0x9c, 0x32, 0x00],
            28,
            0x00,
            [1.270_271_3, -1.000_213_6, 0.500_106_8, 0.0],
        ),
        (
            GgmlType::Q4_0,
            &[0x14, 0xb1, 0x80, 0x8e, 0x85, 0x88],
            12,
            0x88,
            [1.269_531_2, -0.952_148_44, 0.476_074_22, -0.0],
        ),
        (
            GgmlType::Q4_1,
            &[0xd8, 0x30, 0x00, 0xbc, 0x7f, 0x70, 0x7a, 0x77],
            12,
            0x77,
            [1.270_507_8, -1.0, 0.513_671_9, 0.059_570_312],
        ),
        (GgmlType::MXFP4, &[0x7d, 0x07, 0x0e, 0x04, 0x00], 12, 0x00, [1.5, -1.0, 0.5, 0.0]),
    ];
    for (ty, head, count, rest, decoded) in cases {
        let blocks = encode(ty, &values).unwrap();
        assert_eq!(blocks, [head, &vec![rest; count]].concat(), "{ty}");
        let found = decode(ty, &blocks, 32);
        assert_eq!(
            found[..4].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            decoded.map(f32::to_bits),
            "{ty}"
        );
    }
}

/// 2:4: two of each four are zeros of either sign.
fn two_of_four() -> impl Strategy<Value = Vec<f32>> {
    let value = (-1.0f32..1.0, -20i32..12).prop_map(|(x, exponent)| x * 2f32.powi(exponent));
    let group = (value.clone(), value, 0usize..4, 1usize..4, any::<bool>());
    let groups = prop::collection::vec(group, 64);
    groups.prop_map(|groups| {
        let mut values = Vec::with_capacity(256);
        for (first, second, at, further, negative) in groups {
            let mut group = [if negative { -0.0 } else { 0.0 }; 4];
            group[at] = first;
            group[(at + further) % 4] = second;
            values.extend(group);
        }
        values
    })
}

proptest! {
    #[test]
    fn zeros_stay_zeros_where_the_table_says_so(values in two_of_four()) {
        for ty in GgmlType::all().filter(|ty| ty.keeps_zeros() && ty.block_len() > 1) {
            let decoded = decode(ty, &encode(ty, &values).unwrap(), values.len());
            for (i, (value, decoded)) in values.iter().zip(&decoded).enumerate() {
                prop_assert!(*value != 0.0 || *decoded == 0.0, "{ty}: zero {i} became {decoded:e}");
            }
        }
    }

    /// Any finite values are stored with finite scales or refused.
    #[test]
    fn arbitrary_floats_are_survived(
        bits in prop::collection::vec(any::<u32>(), 256),
        exponents in 0u32..256,
    ) {
        let values: Vec<f32> = bits
            .iter()
            // Exponents near each other, so that not all depends on one value.
            .map(|bits| f32::from_bits(bits & 0x83ff_ffff | exponents.min(251) << 23))
            .collect();
        for ty in quant_types() {
            match encode(ty, &values) {
                Ok(blocks) => {
                    prop_assert!(decode(ty, &blocks, 256).iter().all(|value| value.is_finite()), "{ty}");
                }
                Err(error) => prop_assert!(error.to_string().contains("cannot be stored"), "{error}"),
            }
        }
    }
}

#[test]
fn types_with_a_minimum_lose_zeros() {
    let values: Vec<f32> = (0..256)
        .map(|i| if i % 4 < 2 { 0.0 } else { (i * 37 % 101) as f32 / 50.0 - 0.7 })
        .collect();
    for ty in quant_types() {
        let decoded = decode(ty, &encode(ty, &values).unwrap(), 256);
        let lost = values.iter().zip(&decoded).filter(|(x, y)| **x == 0.0 && **y != 0.0).count();
        assert_eq!(lost == 0, ty.keeps_zeros(), "{ty}: {lost} of 128");
    }
}

#[test]
fn a_value_that_is_not_finite_is_refused_with_its_place() {
    for ty in quant_types() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut encoder = Encoder::new(Encoding::Ggml { ty }, "w", &[4, 512]).unwrap();
            encoder.rows(&bytes(&[1.0; 512])).unwrap();
            let mut rows = [0.5; 1024];
            rows[512 + 300] = bad;
            let error = encoder.rows(&bytes(&rows)).unwrap_err();
            assert!(matches!(error, FormatError::Encoding { .. }));
            assert_eq!(
                error.to_string(),
                format!(
                    "tensor `w`: row 2, column 300: {bad:e} cannot be stored as {ty}; expected a finite value"
                )
            );
        }
    }
}

#[test]
fn a_scale_that_overflows_is_refused_with_its_value() {
    let mut values = [0.0; 256];
    values[77] = -1e30;
    for ty in quant_types().filter(|ty| *ty != GgmlType::MXFP4) {
        assert_eq!(
            encode(ty, &values).unwrap_err().to_string(),
            format!(
                "tensor `w`: row 0, column 77: -1e30 cannot be stored as {ty}; expected a value whose block has a scale below 65520, the limit of binary16"
            )
        );
    }
    values[77] = f32::MAX;
    let blocks = encode(GgmlType::MXFP4, &values).unwrap();
    assert!(decode(GgmlType::MXFP4, &blocks, 256)[77] > 2e38);
}

#[test]
fn rows_are_whole_and_made_of_whole_blocks() {
    let encoding = Encoding::Ggml { ty: GgmlType::MXFP4 };
    assert_eq!(
        Encoder::new(encoding, "w", &[2, 48]).unwrap_err().to_string(),
        "tensor `w`: a row of 48 elements is not a whole number of MXFP4 blocks of 32"
    );
    let mut encoder = Encoder::new(encoding, "w", &[2, 32]).unwrap();
    assert_eq!(
        encoder.rows(&[0; 100]).unwrap_err().to_string(),
        "tensor `w`: 100 bytes after row 0; expected whole rows of 128 bytes, 2 in all"
    );
    assert_eq!(
        encoding
            .decode_f32("w", &[2, 32], &[&[0; 33]], 0..2, &mut [0.0; 64])
            .unwrap_err()
            .to_string(),
        "tensor `w`: expected 34 bytes, found 33"
    );
}

#[test]
fn plain_elements_pass_through() {
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        let encoding = Encoding::Ggml { ty };
        let mut encoder = Encoder::new(encoding, "w", &[2, 3]).unwrap();
        let rows: Vec<u8> = (0..6 * encoding.value_dtype().size_bytes() as u8).collect();
        assert_eq!(encoder.rows(&rows).unwrap(), [rows]);
    }
}
