use half::f16;
use proptest::prelude::*;

use super::*;
use crate::encoding::{Encoder, Encoding, testing::Golden};

const F16: Encoding = Encoding::TorchCutlass { dtype: DType::F16 };

/// Packed values and metadata, encoded `at_once` rows at a time.
fn encode(
    encoding: Encoding,
    shape: &[usize],
    dense: &[u8],
    at_once: usize,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let parts = crate::encoding::testing::encode(encoding, "w", shape, dense, at_once)?;
    let [packed, meta] = parts.try_into().unwrap();
    Ok((packed, meta))
}

#[test]
fn bytes_are_those_of_torch() {
    let golden = Golden::open("torch_cutlass.safetensors");
    let cases = golden.cases();
    assert_eq!(cases, ["bf16", "bf16_tall", "f16", "f16_wide", "i8", "i8_wide"]);
    for case in &cases {
        let (dtype, shape, dense) = golden.tensor(&format!("{case}.dense"));
        let encoding = Encoding::TorchCutlass { dtype };
        let components = encoding.components("w", &shape).unwrap();
        for at_once in [shape[0], 5] {
            let (packed, meta) = encode(encoding, &shape, &dense, at_once).unwrap();
            for (component, found) in components.iter().zip([&packed, &meta]) {
                let stored = golden.tensor(&format!("{case}{}", component.suffix));
                assert_eq!((stored.0, &stored.1), (component.dtype, &component.shape), "{case}");
                assert!(stored.2 == *found, "{case}{}", component.suffix);
            }
            let rows = 3..shape[0] - 1;
            let mut out = vec![7];
            encoding.decode_dense("w", &shape, &[&packed, &meta], rows.clone(), &mut out).unwrap();
            let row_bytes = dense.len() / shape[0];
            assert!(out[1..] == dense[rows.start * row_bytes..rows.end * row_bytes], "{case}");
        }
    }
}

/// The example of docs/FORMATS.md.
#[test]
fn example_has_the_documented_bytes() {
    let mut dense = vec![f16::ZERO; 32 * 64];
    let row = [1., 0., 0., 2., 0., -3., 4., 0., 0., 0., 5., 6., 7., 0., 0., 0.];
    for (element, value) in dense[9 * 64 + 16..].iter_mut().zip(row) {
        *element = f16::from_f32(value);
    }
    let dense: Vec<u8> = dense.iter().flat_map(|value| value.to_le_bytes()).collect();
    let (packed, meta) = encode(F16, &[32, 64], &dense, 32).unwrap();
    let kept: Vec<u8> = [1., 2., -3., 4., 5., 6., 7., 0.]
        .iter()
        .flat_map(|&v| f16::from_f32(v).to_le_bytes())
        .collect();
    assert_eq!(packed[2 * (9 * 32 + 8)..][..16], kept);
    assert_eq!(meta[22..24], [0x9C, 0x8E]);
    assert!(meta.iter().enumerate().all(|(at, &byte)| byte == 0xEE || (22..24).contains(&at)));
    let mut floats = vec![9.0; 64];
    F16.decode_f32("w", &[32, 64], &[&packed, &meta], 9..10, &mut floats).unwrap();
    assert_eq!(floats[16..32], row);
}

#[test]
fn shapes_and_types_that_torch_does_not_take_are_refused() {
    let message = |dtype, shape: &[usize]| components("w", dtype, shape).unwrap_err().to_string();
    let limits = |dtype, rows, cols, found| {
        format!(
            "tensor `w`: torch-cutlass needs a multiple of {rows} rows and of {cols} columns for {dtype}, found {found}"
        )
    };
    assert_eq!(message(DType::F16, &[32, 96]), limits("F16", 32, 64, "32 × 96"));
    assert_eq!(message(DType::Bf16, &[48, 64]), limits("BF16", 32, 64, "48 × 64"));
    assert_eq!(message(DType::Bf16, &[0, 64]), limits("BF16", 32, 64, "0 × 64"));
    assert_eq!(message(DType::I8, &[16, 64]), limits("I8", 16, 128, "16 × 64"));
    assert_eq!(
        message(DType::F32, &[32, 64]),
        "tensor `w`: torch-cutlass values of type F32; expected F16, BF16 or I8"
    );
    assert_eq!(
        message(DType::F16, &[2, 32, 64]),
        "tensor `w`: torch-cutlass needs a matrix, found shape [2, 32, 64]"
    );
    assert!(message(DType::F16, &[1 << 40, 1 << 40]).ends_with("overflows"));
}

#[test]
fn a_third_value_is_refused_and_named() {
    let mut dense = vec![0; 32 * 64 * 2];
    for column in [20, 21, 23] {
        dense[2 * (17 * 64 + column)] = 1;
    }
    let error = encode(F16, &[32, 64], &dense, 5).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w`: row 17, columns 20 to 23: 3 values are not +0.0; 2:4 holds two"
    );
}

#[test]
fn illegal_metadata_is_refused_and_named() {
    let (packed, mut meta) = encode(F16, &[32, 64], &[0; 32 * 64 * 2], 32).unwrap();
    // Word (9, 1), its third nibble.
    meta[23] = 0xE3;
    let mut out = vec![1];
    let error = F16.decode_dense("w", &[32, 64], &[&packed, &meta], 0..32, &mut out).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w.meta`: row 9, columns 24 to 27: metadata nibble 0x3 is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe"
    );
    assert_eq!(out, [1]);
    F16.decode_dense("w", &[32, 64], &[&packed, &meta], 0..9, &mut out).unwrap();
}

#[test]
fn an_encoder_wants_all_rows() {
    let mut encoder = Encoder::new(F16, "w", &[32, 64]).unwrap();
    encoder.rows(&[0; 128]).unwrap();
    assert_eq!(encoder.finish().unwrap_err().to_string(), "tensor `w`: 1 of 32 rows were encoded");
}

proptest! {
    #[test]
    fn decode_inverts_encode_for_every_bit_pattern(
        seed in any::<u64>(),
        (dtype, rows, cols) in proptest::sample::select(vec![
            (DType::F16, 32, 64), (DType::Bf16, 96, 192), (DType::I8, 16, 128), (DType::I8, 48, 256),
        ]),
        at_once in 1..40usize,
    ) {
        let shape = [rows, cols];
        let encoding = Encoding::TorchCutlass { dtype };
        let dense = crate::encoding::testing::random_2of4(seed, dtype, rows * cols);
        let (packed, meta) = encode(encoding, &shape, &dense, at_once).unwrap();
        let mut out = vec![];
        encoding.decode_dense("w", &shape, &[&packed, &meta], 0..rows, &mut out).unwrap();
        prop_assert!(out == dense);
    }
}
