use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::encoding::{
    Encoding,
    testing::{Golden, encode, random_2of4},
};

const NAME: &str = "m.weight";
const BF16: Encoding = Encoding::CtSparse24Bitmask { dtype: DType::Bf16 };

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
}

/// The example of docs/FORMATS.md.
const EXAMPLE: [f32; 16] = [1., 0., 0., 2., 0., -3., 4., 0., 0., 0., 5., 6., 7., 0., 0., 0.];

fn decode(parts: &[Vec<u8>], cols: usize) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![];
    BF16.decode_dense(NAME, &[2, cols], &parts, 0..2, &mut out)
        .inspect_err(|_| assert!(out.is_empty()))?;
    Ok(out)
}

#[test]
fn bytes_are_those_of_the_package() {
    let golden = Golden::open("compressed_tensors.safetensors");
    let cases: Vec<String> =
        golden.cases().into_iter().filter(|case| case.starts_with("sparse24_")).collect();
    assert_eq!(cases.len(), 4);
    for case in &cases {
        let (dtype, shape, dense) = golden.tensor(&format!("{case}.dense"));
        let encoding = Encoding::CtSparse24Bitmask { dtype };
        let name = format!("{case}.weight");
        for at_once in [shape[0], 2] {
            let parts = encode(encoding, &name, &shape, &dense, at_once).unwrap();
            for (component, found) in encoding.components(&name, &shape).unwrap().iter().zip(&parts)
            {
                let stored = golden.tensor(&encoding.component_name(&name, component));
                assert_eq!((stored.0, &stored.1), (component.dtype, &component.shape), "{case}");
                assert!(stored.2 == *found, "{case}{}", component.suffix);
            }
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let mut out = vec![];
            encoding.decode_dense(&name, &shape, &parts, 1..shape[0], &mut out).unwrap();
            assert!(out == dense[dense.len() / shape[0]..], "{case}");
        }
    }
}

#[test]
fn example_has_the_documented_bytes() {
    let parts = encode(BF16, NAME, &[2, 8], &bf16s(&EXAMPLE), 2).unwrap();
    assert_eq!(parts[0], bf16s(&[1., 2., -3., 4., 5., 6., 7., 0.]));
    assert_eq!(parts[1], [0x69, 0x5C]);
    assert_eq!(parts[2], [2, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    let names: Vec<String> = BF16
        .components(NAME, &[2, 8])
        .unwrap()
        .iter()
        .map(|component| BF16.component_name(NAME, component))
        .collect();
    assert_eq!(names, ["m.compressed", "m.bitmask", "m.shape"]);
    let mut floats = [0.0; 8];
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    BF16.decode_f32(NAME, &[2, 8], &parts, 1..2, &mut floats).unwrap();
    assert_eq!(floats.map(f32::to_bits)[..], EXAMPLE.map(f32::to_bits)[8..]);
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let message =
        |name, dtype, shape: &[usize]| components(name, dtype, shape).unwrap_err().to_string();
    assert_eq!(
        message("m.bias", DType::F16, &[2, 8]),
        "tensor `m.bias`: sparse-24-bitmask replaces the `.weight` of a module; the name has none"
    );
    assert_eq!(
        message(NAME, DType::U8, &[2, 8]),
        "tensor `m.weight`: sparse-24-bitmask values of type U8; expected F32, F16, BF16, F8_E4M3 or I8"
    );
    assert_eq!(
        message(NAME, DType::F16, &[8]),
        "tensor `m.weight`: sparse-24-bitmask needs a matrix, found shape [8]"
    );
    assert_eq!(
        message(NAME, DType::F16, &[2, 6]),
        "tensor `m.weight`: sparse-24-bitmask needs a multiple of 4 columns, found 6"
    );
    assert!(message(NAME, DType::F16, &[usize::MAX, 4]).ends_with("overflows"));
    let mut dense = EXAMPLE;
    dense[13] = 1.0;
    dense[15] = -0.0;
    assert_eq!(
        encode(BF16, NAME, &[2, 8], &bf16s(&dense), 1).unwrap_err().to_string(),
        "tensor `m.weight`: row 1, columns 4 to 7: 3 values are not +0.0; 2:4 holds two"
    );
}

#[test]
fn components_that_disagree_are_refused_and_named() {
    let parts = encode(BF16, NAME, &[2, 8], &bf16s(&EXAMPLE), 2).unwrap();
    let mut wrong = parts.clone();
    wrong[1][1] = 0x7C;
    assert_eq!(
        decode(&wrong, 8).unwrap_err().to_string(),
        "tensor `m.bitmask`: row 1, columns 4 to 7: 3 bits are set; expected 2"
    );
    let mut wrong = parts.clone();
    wrong[2][8] = 12;
    assert_eq!(
        decode(&wrong, 8).unwrap_err().to_string(),
        "tensor `m.shape`: expected 2 and 8, found [2, 12]"
    );
    let mut wrong = encode(BF16, NAME, &[2, 4], &bf16s(&EXAMPLE[..8]), 2).unwrap();
    wrong[1][0] |= 0x40;
    assert_eq!(
        decode(&wrong, 4).unwrap_err().to_string(),
        "tensor `m.bitmask`: row 0: an unused mask bit is not 0"
    );
    let mut wrong = parts;
    wrong[0].pop();
    assert_eq!(
        decode(&wrong, 8).unwrap_err().to_string(),
        "tensor `m.compressed`: expected 16 bytes, found 15"
    );
}

proptest! {
    #[test]
    fn decode_inverts_encode_for_every_bit_pattern(
        seed in any::<u64>(), rows in 0..7usize, groups in 0..9usize, at_once in 1..4usize,
    ) {
        for dtype in [DType::I8, DType::F8E4m3, DType::F16, DType::Bf16, DType::F32] {
            let encoding = Encoding::CtSparse24Bitmask { dtype };
            let shape = [rows, 4 * groups];
            let dense = random_2of4(seed, dtype, rows * 4 * groups);
            let parts = encode(encoding, NAME, &shape, &dense, at_once).unwrap();
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let mut out = vec![];
            encoding.decode_dense(NAME, &shape, &parts, 0..rows, &mut out).unwrap();
            prop_assert_eq!(out, dense);
        }
    }
}
