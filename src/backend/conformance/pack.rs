//! Values on their way to the device and back, rounded and packed.

use sparsepack_formats::{DType, Encoder, Encoding, encoding::dense};

use super::{super::*, Instance, random, rng};

const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::Bf16, DType::F8E4m3];

fn bytes_of(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    dense::encode_f32("w", dtype, values, &mut bytes).unwrap();
    bytes
}

fn values_of(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.size_bytes()];
    dense::to_f32(dtype, bytes, &mut values);
    values
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The values, none beyond what a type holds.
fn within(dtype: DType, values: &[f32]) -> Vec<f32> {
    let most = if dtype == DType::F8E4m3 { 448.0 } else { f32::MAX };
    values.iter().map(|value| value.clamp(-most, most)).collect()
}

/// Values of every magnitude that binary16 has, its subnormals and ties among them.
fn of_every_size(seed: usize, count: usize) -> Vec<f32> {
    let scales = random(&mut rng(seed + 100), count);
    let values = random(&mut rng(seed), count).into_iter().zip(scales);
    let mut values: Vec<f32> = values.map(|(w, scale)| w * (scale * 26.0 - 11.0).exp2()).collect();
    let special = [0.0, -0.0, 2049.0, -2051.0, 257.0, 2f32.powi(-24), 2f32.powi(-25) * 1.5, 440.0];
    for (value, special) in values.iter_mut().step_by(3).zip(special.iter().cycle()) {
        *value = *special;
    }
    values
}

pub(super) fn staged_values_arrive<B: Backend>(t: &Instance<B>) {
    let b = &t.backend;
    // The last is larger than a piece of a pinned copy, in each type.
    for (rows, cols) in [(1, 1), (3, 5), (64, 33), (0, 4), (3001, 2999)] {
        for dtype in DTYPES {
            let bytes = bytes_of(dtype, &within(dtype, &of_every_size(rows, rows * cols)));
            let expected = bits(&values_of(dtype, &bytes));
            let values = StoredValues { dtype, bytes: &bytes };
            let staged = b.stage(values, rows, cols).unwrap();
            // What was given may be gone by the time it is used, and another may come and go unused.
            let other = b.stage(StoredValues { dtype, bytes: &bytes }, rows, cols).unwrap();
            drop(bytes);
            for _ in 0..2 {
                let matrix = b.receive(&staged).unwrap();
                assert_eq!(b.shape(&matrix), (rows, cols));
                assert_eq!(bits(&t.download(&matrix)), expected, "{dtype} {rows} x {cols}");
            }
            drop(other);
        }
    }
    let refused =
        |dtype, bytes: &[u8]| b.stage(StoredValues { dtype, bytes }, 2, 2).unwrap_err().to_string();
    assert_eq!(refused(DType::F32, &[0; 8]), "stage: shapes do not fit: 8 bytes of F32 for [2, 2]");
    assert_eq!(refused(DType::U8, &[0; 4]), "stage: shapes do not fit: values of type U8");
}

pub(super) fn large_matrices_come_and_go<B: Backend>(t: &Instance<B>) {
    let (rows, cols) = (2100, 2100);
    let values = random(&mut rng(3), rows * cols);
    let mut matrix = t.upload(&values, rows, cols);
    for _ in 0..3 {
        matrix = t.backend.onload(t.backend.offload(matrix).unwrap()).unwrap();
    }
    assert!(t.download(&matrix) == values);
    let halves = values.iter().map(|value| half::bf16::from_f32(*value)).collect();
    for (rows, data) in [
        (2100, HostData::F32(values)),
        (2100, HostData::Bf16(halves)),
        (1, HostData::Bf16(vec![half::bf16::ONE; 2100])),
        (0, HostData::F32(Vec::new())),
    ] {
        let host = HostMatrix { rows, cols, data };
        let coming = t.backend.bring(&host).unwrap();
        let unused = t.backend.bring(&host).unwrap();
        // What leaves is what it was then, whatever becomes of its memory.
        let left = t.backend.leave(t.backend.receive(&coming).unwrap()).unwrap();
        let again = t.backend.leave(t.backend.receive(&coming).unwrap()).unwrap();
        drop(coming);
        let other = t.backend.zeros(rows, cols).unwrap();
        assert!(left.wait().unwrap() == host && again.wait().unwrap() == host);
        drop((unused, other));
    }
    let wrong = HostMatrix { rows: 2, cols: 2, data: HostData::F32(vec![0.0; 3]) };
    assert!(t.backend.bring(&wrong).is_err());
}

pub(super) fn stored_types_round_to_nearest<B: Backend>(t: &Instance<B>) {
    for (rows, cols) in [(1, 1), (7, 13), (130, 257), (0, 3)] {
        let values = of_every_size(cols, rows * cols);
        for dtype in DTYPES {
            let values = within(dtype, &values);
            let expected = bytes_of(dtype, &values);
            let mut matrix = t.upload(&values, rows, cols);
            let stored = t.backend.store(&mut matrix, dtype).unwrap();
            let held = bits(&t.download(&matrix));
            assert_eq!(held, bits(&values_of(dtype, &expected)), "{dtype}");
            // The matrix may be used and dropped before its bytes are waited for.
            t.backend.zero_columns(&mut matrix, &(0..cols).collect::<Vec<_>>()).unwrap();
            drop(matrix);
            assert_eq!(stored.wait().unwrap(), expected, "{dtype}");
        }
    }
    let mut matrix = t.upload(&[1.0; 4], 2, 2);
    let error = t.backend.store(&mut matrix, DType::I8).unwrap_err().to_string();
    assert_eq!(error, "store: shapes do not fit: values of type I8");
    drop(t.backend.store(&mut matrix, DType::Bf16).unwrap());
}

pub(super) fn values_too_large_to_store_are_named<B: Backend>(t: &Instance<B>) {
    let mut values = vec![1.0f32; 3 * 700];
    values[1500] = -65520.0;
    for (dtype, refused) in [(DType::F16, true), (DType::Bf16, false), (DType::F32, false)] {
        let stored = t.backend.store(&mut t.upload(&values, 3, 700), dtype);
        let packed = t.backend.pack_24(&mut t.upload(&values, 3, 700), dtype);
        for error in [stored.err(), packed.err()] {
            let expected = "value -6.552e4 at index 1500 is too large for F16";
            let expected = refused.then(|| expected.to_owned());
            assert_eq!(error.map(|error| error.to_string()), expected);
        }
    }
    values[1500] = f32::MAX;
    let error = t.backend.store(&mut t.upload(&values, 3, 700), DType::Bf16).unwrap_err();
    assert!(error.to_string().ends_with("is too large for BF16"), "{error}");
    // Infinities pass, as in the codecs: who stores has looked for them.
    values[1500] = f32::INFINITY;
    assert!(t.backend.store(&mut t.upload(&values, 3, 700), DType::F16).is_ok());
}

/// At most two values in every four columns, and sometimes fewer.
fn two_of_four(seed: usize, count: usize) -> Vec<f32> {
    let mut values = of_every_size(seed, count);
    for (group, values) in values.chunks_exact_mut(4).enumerate() {
        let zeros = [[0, 1], [2, 3], [0, 3], [1, 2], [0, 2], [1, 3]];
        for at in zeros[group % 6] {
            values[at] = 0.0;
        }
        values[group * 7 % 4] = if group % 5 == 0 { 0.0 } else { values[group * 7 % 4] };
    }
    values
}

pub(super) fn packing_is_that_of_the_format<B: Backend>(t: &Instance<B>) {
    for (rows, cols) in [(1, 4), (1, 8), (67, 12), (130, 256), (5, 2052), (0, 8)] {
        let values = two_of_four(cols, rows * cols);
        for dtype in DTYPES {
            let values = within(dtype, &values);
            let dense = bytes_of(dtype, &values);
            let encoding = Encoding::Sparse24 { dtype };
            let expected =
                Encoder::new(encoding, "w", &[rows, cols]).unwrap().rows(&dense).unwrap();
            let mut matrix = t.upload(&values, rows, cols);
            let packed = t.backend.pack_24(&mut matrix, dtype).unwrap().unwrap();
            assert_eq!(bits(&t.download(&matrix)), bits(&values_of(dtype, &dense)), "{dtype}");
            drop(matrix);
            let packed = packed.map(|part| part.wait().unwrap());
            assert_eq!(packed.as_slice(), expected, "{dtype} {rows} x {cols}");
        }
    }
    // Three values in one group, the last; a negative zero is one.
    let mut full = vec![0.0; 9 * 44];
    full[9 * 44 - 3..].copy_from_slice(&[1.0, -0.0, 2.0]);
    for dtype in DTYPES {
        let packed = t.backend.pack_24(&mut t.upload(&full, 9, 44), dtype).unwrap();
        assert!(packed.is_none(), "{dtype}");
    }
    // What rounds to zero is none.
    full[9 * 44 - 2] = 1e-12;
    for (dtype, packs) in [(DType::F32, false), (DType::Bf16, false), (DType::F16, true)] {
        let packed = t.backend.pack_24(&mut t.upload(&full, 9, 44), dtype).unwrap();
        assert_eq!(packed.is_some(), packs, "{dtype}");
    }
    assert!(t.backend.pack_24(&mut t.upload(&[0.0; 12], 2, 6), DType::F32).is_err());
}
