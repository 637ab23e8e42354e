use half::bf16;
use proptest::prelude::*;

use super::*;

const SHAPE: MatrixShape = MatrixShape { rows: 2, cols: 8 };

/// The example of docs/FORMATS.md.
fn example() -> Vec<u8> {
    [1., 0., 0., 2., 0., -3., 4., 0., 0., 0., 5., 6., 7., 0., 0., 0.]
        .iter()
        .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
        .collect()
}

fn pack(dtype: DType, matrix: MatrixShape, dense: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut values, mut metadata) = (vec![], vec![]);
    encode("w", dtype, matrix, dense, &mut values, &mut metadata)?;
    Ok((values, metadata))
}

#[test]
fn example_has_the_documented_bytes() {
    let (values, metadata) = pack(DType::Bf16, SHAPE, &example()).unwrap();
    assert_eq!(metadata, [0x9C, 0x8E]);
    assert_eq!(
        values,
        [
            [0x80, 0x3F, 0x00, 0x40, 0x40, 0xC0, 0x80, 0x40],
            [0xA0, 0x40, 0xC0, 0x40, 0xE0, 0x40, 0x00, 0x00],
        ]
        .concat()
    );
    let mut out = vec![];
    decode("w", DType::Bf16, SHAPE, &values, &metadata, 1..2, &mut out).unwrap();
    assert_eq!(out, example()[16..]);
    let mut floats = [9.0; 8];
    decode_f32("w", DType::Bf16, SHAPE, &values, &metadata, 0..1, &mut floats).unwrap();
    assert_eq!(floats.map(|value| value as i32), [1, 0, 0, 2, 0, -3, 4, 0]);
}

#[test]
fn fillers_follow_the_cutlass_table() {
    // Flags of columns 0 1 2 3 and the nibble: research on PyTorch's conversion function.
    let table = [
        ("1100", 0x4),
        ("1010", 0x8),
        ("1001", 0xC),
        ("0110", 0x9),
        ("0101", 0xD),
        ("0011", 0xE),
        ("0000", 0xE),
        ("1000", 0x8),
        ("0100", 0x9),
        ("0010", 0xE),
        ("0001", 0xE),
    ];
    for (flags, nibble) in table {
        for dtype in [DType::I8, DType::F16, DType::F32] {
            let dense: Vec<u8> = flags
                .bytes()
                .flat_map(|flag| {
                    let mut element = vec![0; dtype.size_bytes()];
                    element[0] = flag - b'0';
                    element
                })
                .collect();
            let matrix = MatrixShape { rows: 1, cols: 4 };
            let (_, metadata) = pack(dtype, matrix, &dense).unwrap();
            assert_eq!(metadata, [nibble | PAD << 4], "{flags} {dtype}");
        }
    }
}

#[test]
fn three_values_in_a_group_are_refused_and_named() {
    let mut dense = example();
    dense[2 * 14] = 1;
    dense[2 * 13 + 1] = 0x80;
    let (mut values, mut metadata) = (vec![1], vec![2]);
    let error = encode("w", DType::Bf16, SHAPE, &dense, &mut values, &mut metadata).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w`: row 1, columns 4 to 7: 3 values are not +0.0; 2:4 holds two"
    );
    assert_eq!((values, metadata), (vec![1], vec![2]));
}

#[test]
fn illegal_metadata_is_refused_and_named() {
    let (values, mut metadata) = pack(DType::Bf16, SHAPE, &example()).unwrap();
    for nibble in [0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xA, 0xB, 0xF] {
        metadata[1] = 0xE | nibble << 4;
        let mut out = vec![3];
        let error =
            decode("w", DType::Bf16, SHAPE, &values, &metadata, 0..2, &mut out).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "tensor `w.metadata`: row 1, columns 4 to 7: metadata nibble {nibble:#x} is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe"
            )
        );
        assert_eq!(out, [3]);
    }
    let matrix = MatrixShape { rows: 1, cols: 4 };
    let error = decode("w", DType::F16, matrix, &[0; 4], &[0x4E], 0..1, &mut vec![]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w.metadata`: row 0: the unused metadata nibble is 0x4, expected 0xe"
    );
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let message = |dtype, shape: &[usize]| components("w", dtype, shape).unwrap_err().to_string();
    assert_eq!(
        message(DType::F16, &[2, 6]),
        "tensor `w`: 2:4 needs a multiple of 4 columns, found 6"
    );
    assert_eq!(message(DType::F16, &[8]), "tensor `w`: 2:4 needs a matrix, found shape [8]");
    assert_eq!(
        message(DType::I16, &[2, 8]),
        "tensor `w`: 2:4 values of type I16; expected F32, F16, BF16, F8_E4M3, I8 or U8"
    );
    assert!(message(DType::F16, &[usize::MAX, 8]).ends_with("overflows"));
    let error = pack(DType::F16, SHAPE, &[0; 30]).unwrap_err();
    assert_eq!(error.to_string(), "tensor `w`: dense has length 30, expected 32");
}

#[test]
fn nibbles_that_do_not_fit_are_refused_and_named() {
    let matrix = MatrixShape { rows: 2, cols: 4 };
    let (mut values, mut metadata) = (vec![1], vec![2]);
    let encoded =
        encode_nibbles("w", matrix, &[0x01, 0x20, 0x11, 0x01], &mut values, &mut metadata);
    assert_eq!(
        encoded.unwrap_err().to_string(),
        "tensor `w`: row 1, columns 0 to 3: 3 values are not +0.0; 2:4 holds two"
    );
    assert_eq!((values, metadata), (vec![1], vec![2]));
    let mut out = vec![3];
    let error = decode_nibbles("w", matrix, &[0x21, 0x21], &[0xE4, 0xE0], 0..2, &mut out);
    assert_eq!(
        error.unwrap_err().to_string(),
        "tensor `w.metadata`: row 1, columns 0 to 3: metadata nibble 0x0 is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe"
    );
    assert_eq!(out, [3]);
    let error = decode_nibbles("w", matrix, &[0x21], &[0xE4, 0xE4], 0..2, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "tensor `w`: .values has length 1, expected 2");
}

#[test]
fn integers_are_packed_but_are_no_weights() {
    let matrix = MatrixShape { rows: 1, cols: 4 };
    let (values, metadata) = pack(DType::I8, matrix, &[0, 5, 0, 0xFB]).unwrap();
    assert_eq!((values.as_slice(), metadata.as_slice()), (&[5, 0xFB][..], &[0xED][..]));
    let out = &mut [0.0; 4];
    let error = decode_f32("w", DType::I8, matrix, &values, &metadata, 0..1, out).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w`: I8 values are not weights; expected F32, F16, BF16 or F8_E4M3"
    );
}

#[test]
fn empty_matrices_pack_to_nothing() {
    for matrix in [MatrixShape { rows: 0, cols: 8 }, MatrixShape { rows: 3, cols: 0 }] {
        let (values, metadata) = pack(DType::F16, matrix, &[]).unwrap();
        assert!(values.is_empty() && metadata.is_empty());
        let (mut out, rows) = (vec![], 0..matrix.rows);
        decode("w", DType::F16, matrix, &[], &[], rows.clone(), &mut out).unwrap();
        decode_f32("w", DType::F16, matrix, &[], &[], rows, &mut []).unwrap();
        assert!(out.is_empty());
    }
}

/// Four columns of which at most two hold any bit pattern.
fn group() -> impl Strategy<Value = [u32; 4]> {
    (any::<u32>(), any::<u32>(), 0..4usize, 0..4usize).prop_map(|(a, b, i, j)| {
        let mut group = [0; 4];
        group[i] = a;
        group[j] = b;
        group
    })
}

/// What each kernel makes of a row that starts at an odd address.
fn pack_with(kernel: Kernel, dtype: DType, dense: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let shifted = [&[0], dense].concat();
    let groups = dense.len() / 4 / dtype.size_bytes();
    let mut values = vec![9; dense.len() / 2 + 1];
    let mut metadata = vec![9; groups.div_ceil(2) + 1];
    let legal = kernel.pack(dtype, &shifted[1..], &mut values[1..], &mut metadata[1..]);
    legal.then(|| (values.split_off(1), metadata.split_off(1)))
}

fn unpack_with(kernel: Kernel, dtype: DType, values: &[u8], metadata: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![9; 2 * values.len()];
    kernel.unpack(dtype, values, metadata, &mut out).then_some(out)
}

/// One of each width.
const TYPES: [DType; 3] = [DType::I8, DType::Bf16, DType::F32];

/// Elements whose flags are the bits of `flags`, all of them different and with one byte that is
/// not zero.
fn elements(dtype: DType, flags: impl Iterator<Item = bool>) -> Vec<u8> {
    let size = dtype.size_bytes();
    let mut dense = vec![];
    for (index, flag) in flags.enumerate() {
        let at = dense.len() + index % size;
        dense.resize(dense.len() + size, 0);
        dense[at] = u8::from(flag) * (index % 255 + 1) as u8;
    }
    dense
}

#[test]
fn kernels_agree_on_all_flags_of_four_groups() {
    let legal = |flags: u32| (0..4).all(|group| (flags >> (4 * group) & 0xF).count_ones() <= 2);
    let bits = |flags: u32| (0..16).map(move |bit| flags >> bit & 1 == 1);
    for dtype in TYPES {
        let patterns = (0..1 << 16).filter(|&flags| legal(flags));
        // A row of all legal ones and an odd group, so that each also stands at each place of a step.
        let rows = (0..4).map(|shift| {
            let lead = std::iter::repeat_n(false, 4 * shift);
            elements(
                dtype,
                lead.chain(patterns.clone().flat_map(bits)).chain([true; 2]).chain([false; 2]),
            )
        });
        for dense in rows {
            let expected = pack_with(Kernel::Portable, dtype, &dense).unwrap();
            for kernel in Kernel::available() {
                let packed = pack_with(kernel, dtype, &dense).unwrap();
                assert!(packed == expected, "{kernel:?} {dtype}");
                let dense_again = unpack_with(kernel, dtype, &packed.0, &packed.1);
                assert!(dense_again.as_ref() == Some(&dense), "{kernel:?} {dtype}");
            }
        }
        for flags in (0..1 << 16).filter(|&flags| !legal(flags)) {
            // One step and nothing else.
            let dense = elements(dtype, (0..48).map(|_| false).chain(bits(flags)));
            for kernel in Kernel::available() {
                assert_eq!(pack_with(kernel, dtype, &dense), None, "{kernel:?} {dtype} {flags:#x}");
            }
        }
    }
}

#[test]
fn kernels_agree_on_every_metadata_byte() {
    let values: Vec<u8> = (0..=255).cycle().take(41 * 8).collect();
    for dtype in TYPES {
        let values = &values[..41 * 2 * dtype.size_bytes()];
        for position in 0..21 {
            for byte in 0..=255 {
                let mut metadata = [0xE4; 21];
                metadata[position] = byte;
                let expected = unpack_with(Kernel::Portable, dtype, values, &metadata);
                for kernel in Kernel::available() {
                    let found = unpack_with(kernel, dtype, values, &metadata);
                    assert_eq!(found, expected, "{kernel:?} {dtype} {position} {byte:#x}");
                }
            }
        }
    }
}

#[test]
fn kernels_refuse_lengths_that_do_not_belong_together() {
    for kernel in Kernel::available() {
        let (mut values, mut metadata) = ([0; 64], [0; 8]);
        assert!(!kernel.pack(DType::F16, &[0; 126], &mut values, &mut metadata));
        assert!(!kernel.pack(DType::F16, &[0; 128], &mut values[1..], &mut metadata));
        assert!(!kernel.pack(DType::F16, &[0; 128], &mut values, &mut metadata[1..]));
        assert!(!kernel.pack(DType::I16, &[0; 128], &mut values, &mut metadata));
        assert!(!kernel.unpack(DType::F16, &values, &metadata, &mut [0; 127]));
        assert!(kernel.pack(DType::F16, &[0; 128], &mut values, &mut metadata));
    }
}

#[test]
fn the_row_of_a_defect_is_found_in_a_run_of_rows() {
    // 64 columns: many rows in one run. 68: one row a run.
    for cols in [64, 68] {
        let matrix = MatrixShape { rows: 40, cols };
        let mut dense = vec![0; 40 * cols * 2];
        let (mut values, mut metadata) = pack(DType::F16, matrix, &dense).unwrap();
        metadata[37 * cols.div_ceil(8) + 2] = 0xE0;
        let error = decode_into(
            "w",
            DType::F16,
            matrix,
            &values,
            &metadata,
            30..40,
            &mut dense[..10 * cols * 2],
        );
        let message = error.unwrap_err().to_string();
        assert!(message.contains("row 37, columns 16 to 19: metadata nibble 0x0"), "{message}");
        for column in [20, 21, 23] {
            dense[2 * (31 * cols + column)] = 1;
        }
        let error = encode_into("w", DType::F16, matrix, &dense, &mut values, &mut metadata);
        assert_eq!(
            error.unwrap_err().to_string(),
            "tensor `w`: row 31, columns 20 to 23: 3 values are not +0.0; 2:4 holds two"
        );
    }
}

proptest! {
    #[test]
    fn kernels_agree_on_every_bit_pattern(
        groups in proptest::collection::vec(group(), 0..120),
        full in proptest::option::of((any::<proptest::sample::Index>(), 0..4usize)),
    ) {
        for dtype in TYPES {
            let mut groups = groups.clone();
            if let (Some((index, column)), false) = (&full, groups.is_empty()) {
                let at = index.index(groups.len());
                groups[at] = [1 << 24; 4];
                groups[at][*column] = 0;
            }
            let bytes = |bits: &u32| bits.to_le_bytes()[4 - dtype.size_bytes()..].to_vec();
            let dense: Vec<u8> = groups.as_flattened().iter().flat_map(bytes).collect();
            let expected = pack_with(Kernel::Portable, dtype, &dense);
            for kernel in Kernel::available() {
                let packed = pack_with(kernel, dtype, &dense);
                prop_assert_eq!(&packed, &expected);
                if let Some((values, metadata)) = packed {
                    let dense_again = unpack_with(kernel, dtype, &values, &metadata);
                    prop_assert_eq!(dense_again.as_ref(), Some(&dense));
                }
            }
        }
    }

    #[test]
    fn decode_inverts_encode_for_every_bit_pattern(
        cols in 1..7usize,
        groups in proptest::collection::vec(group(), 0..60),
        special in proptest::sample::select(vec![0x8000_8000u32, 0x7FC1_7E01, 0x7F81_7C01, 1]),
    ) {
        let rows = groups.len() / cols;
        let matrix = MatrixShape { rows, cols: 4 * cols };
        for dtype in [DType::U8, DType::I8, DType::F8E4m3, DType::F16, DType::Bf16, DType::F32] {
            let dense: Vec<u8> = groups[..rows * cols]
                .as_flattened()
                .iter()
                // A third of the values become -0.0, a NaN with a payload, or a subnormal.
                .map(|&bits| if bits % 3 == 1 { special } else { bits })
                .flat_map(|bits| bits.to_le_bytes()[4 - dtype.size_bytes()..].to_vec())
                .collect();
            let (values, metadata) = pack(dtype, matrix, &dense).unwrap();
            let parts = components("w", dtype, &[rows, 4 * cols]).unwrap();
            prop_assert_eq!(values.len() as u64, parts[0].bytes);
            prop_assert_eq!(metadata.len() as u64, parts[1].bytes);
            let mut out = vec![];
            decode("w", dtype, matrix, &values, &metadata, 0..rows, &mut out).unwrap();
            prop_assert_eq!(&out, &dense);
            let (mut values_again, mut metadata_again) = (values.clone(), metadata.clone());
            values_again.fill(7);
            metadata_again.fill(7);
            encode_into("w", dtype, matrix, &dense, &mut values_again, &mut metadata_again).unwrap();
            prop_assert_eq!((&values_again, &metadata_again), (&values, &metadata));
            out.fill(7);
            decode_into("w", dtype, matrix, &values, &metadata, 0..rows, &mut out).unwrap();
            prop_assert_eq!(&out, &dense);
            if !dtype.is_float_weight() {
                continue;
            }
            let mut floats = vec![0.0; rows * 4 * cols];
            decode_f32("w", dtype, matrix, &values, &metadata, 0..rows, &mut floats).unwrap();
            let mut expected = floats.clone();
            dense::decode_f32("w", dtype, matrix, &dense, 0..rows, &mut expected).unwrap();
            let bits = |v: &[f32]| v.iter().map(|f| f.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&floats), bits(&expected));
        }
    }

    #[test]
    fn nibbles_are_packed_as_bytes_are(
        cols in 1..7usize,
        groups in proptest::collection::vec(group(), 0..60),
    ) {
        let rows = groups.len() / cols;
        let matrix = MatrixShape { rows, cols: 4 * cols };
        let codes: Vec<u8> =
            groups[..rows * cols].as_flattened().iter().map(|bits| (bits % 16) as u8).collect();
        let pairs = |codes: &[u8]| codes.chunks(2).map(|c| c[0] | c[1] << 4).collect::<Vec<_>>();
        let (values, metadata) = pack(DType::U8, matrix, &codes).unwrap();
        let (mut packed, mut packed_metadata) = (vec![], vec![]);
        let dense = pairs(&codes);
        encode_nibbles("w", matrix, &dense, &mut packed, &mut packed_metadata).unwrap();
        prop_assert_eq!(&packed, &pairs(&values));
        prop_assert_eq!(&packed_metadata, &metadata);
        let (some, mut out) = (rows / 3..rows, vec![]);
        decode_nibbles("w", matrix, &packed, &metadata, some.clone(), &mut out).unwrap();
        prop_assert_eq!(&out, &dense[some.start * 2 * cols..]);
    }

    #[test]
    fn any_metadata_decodes_or_is_refused(
        metadata in proptest::collection::vec(any::<u8>(), 6),
        values in proptest::collection::vec(any::<u8>(), 40),
    ) {
        let matrix = MatrixShape { rows: 2, cols: 20 };
        let mut out = vec![];
        if decode("w", DType::F16, matrix, &values, &metadata, 0..2, &mut out).is_err() {
            prop_assert!(out.is_empty());
        }
    }
}
