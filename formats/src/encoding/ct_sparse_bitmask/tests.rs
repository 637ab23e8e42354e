use proptest::prelude::*;

use super::*;
use crate::encoding::{
    Encoding,
    testing::{Golden, encode, random_2of4},
};

const NAME: &str = "m.weight";

fn i8(kept: u64) -> Encoding {
    Encoding::CtSparseBitmask { dtype: DType::I8, kept }
}

/// The example of docs/FORMATS.md.
const EXAMPLE: [u8; 16] = [1, 0, 0, 2, 0, 3, 4, 0, 0, 0, 5, 6, 7, 0, 0, 0];

fn decode(encoding: Encoding, shape: &[usize], parts: &[Vec<u8>]) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![];
    encoding
        .decode_dense(NAME, shape, &parts, 0..shape[0], &mut out)
        .inspect_err(|_| assert!(out.is_empty()))?;
    Ok(out)
}

#[test]
fn bytes_are_those_of_the_package() {
    let golden = Golden::open("compressed_tensors.safetensors");
    let cases: Vec<String> =
        golden.cases().into_iter().filter(|case| case.starts_with("bitmask_")).collect();
    assert_eq!(cases.len(), 4);
    for case in &cases {
        let (dtype, shape, dense) = golden.tensor(&format!("{case}.dense"));
        let elements = dense.chunks(dtype.size_bytes());
        let kept = elements.filter(|element| element.iter().any(|&byte| byte != 0)).count() as u64;
        let encoding = Encoding::CtSparseBitmask { dtype, kept };
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
    let parts = encode(i8(7), NAME, &[2, 8], &EXAMPLE, 2).unwrap();
    assert_eq!(parts[0], [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(parts[1], [0x69, 0x1C]);
    assert_eq!(parts[2], [2, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(parts[3], [0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    // Two more than there are values: the lowest zeros of the last row.
    let parts = encode(i8(9), NAME, &[2, 8], &EXAMPLE, 1).unwrap();
    assert_eq!(parts[0], [1, 2, 3, 4, 0, 0, 5, 6, 7]);
    assert_eq!(parts[1], [0x69, 0x1F]);
    assert_eq!(decode(i8(9), &[2, 8], &parts).unwrap(), EXAMPLE);
    // With thirteen, the row before has one too.
    let parts = encode(i8(13), NAME, &[2, 8], &EXAMPLE, 1).unwrap();
    assert_eq!(parts[1], [0x6B, 0xFF]);
    assert_eq!(decode(i8(13), &[2, 8], &parts).unwrap(), EXAMPLE);
}

#[test]
fn more_values_than_planned_are_refused() {
    let error = encode(i8(6), NAME, &[2, 8], &EXAMPLE, 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `m.weight`: row 1: more values than the 6 that were planned"
    );
    let error = i8(17).components(NAME, &[2, 8]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `m.weight`: 17 kept values of 16 elements");
}

#[test]
fn components_that_disagree_are_refused_and_named() {
    let parts = encode(i8(7), NAME, &[2, 8], &EXAMPLE, 2).unwrap();
    let message = |part: usize, byte: usize, value: u8| {
        let mut wrong = parts.clone();
        wrong[part][byte] = value;
        decode(i8(7), &[2, 8], &wrong).unwrap_err().to_string()
    };
    let disagree = |row, found| {
        format!(
            "tensor `m.row_offsets`: row {row}: bitmask count not matching values ({found} of 7)"
        )
    };
    assert_eq!(message(1, 0, 0x68), disagree(0, "3 bits are set, the values are 0 to 4"));
    assert_eq!(message(1, 1, 0x1F), disagree(1, "5 bits are set, the values are 4 to 7"));
    assert_eq!(message(3, 0, 1), disagree(0, "4 bits are set, the values are 1 to 4"));
    assert_eq!(
        message(3, 15, 0x80),
        disagree(0, "4 bits are set, the values are 0 to -9223372036854775804")
    );
    assert_eq!(message(2, 0, 3), "tensor `m.shape`: expected 2 and 8, found [3, 8]");
    let mut padded = encode(i8(4), NAME, &[1, 5], &[1, 2, 3, 4, 0], 1).unwrap();
    padded[1][0] = 0x27;
    assert_eq!(
        decode(i8(4), &[1, 5], &padded).unwrap_err().to_string(),
        "tensor `m.bitmask`: row 0: an unused mask bit is not 0"
    );
}

proptest! {
    #[test]
    fn decode_inverts_encode_for_any_room(
        seed in any::<u64>(), rows in 0..7usize, cols in 0..30usize, at_once in 1..4usize,
        room in 0..=100usize,
    ) {
        for dtype in [DType::I8, DType::F8E4m3, DType::F16, DType::Bf16, DType::F32] {
            let shape = [rows, cols];
            let width = dtype.size_bytes();
            let dense = &random_2of4(seed, dtype, (rows * cols).next_multiple_of(4))[..rows * cols * width];
            let values = dense.chunks(width).filter(|element| element.iter().any(|&b| b != 0)).count();
            let kept = values + (rows * cols - values) * room / 100;
            let encoding = Encoding::CtSparseBitmask { dtype, kept: kept as u64 };
            let parts = encode(encoding, NAME, &shape, dense, at_once).unwrap();
            prop_assert_eq!(decode(encoding, &shape, &parts).unwrap(), dense);
            if values > 0 {
                let encoding = Encoding::CtSparseBitmask { dtype, kept: values as u64 - 1 };
                prop_assert!(encode(encoding, NAME, &shape, dense, at_once).is_err());
            }
        }
    }
}
