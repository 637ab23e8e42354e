//! One test per defect: the variant, and the message without the path.

use sparsepack_formats::FormatError as E;

use crate::builder::{Gguf, array, pair, raw_string, string};
use crate::read;

/// The error and its message after `path: `.
fn refused(bytes: &[u8]) -> (E, String) {
    let error = read(bytes).expect_err("the file is defective");
    let message = error.to_string();
    let (_, message) = message.split_once(": ").unwrap();
    (error, message.to_owned())
}

macro_rules! assert_refused {
    ($bytes:expr, $variant:pat, $message:expr) => {{
        let (error, message) = refused(&$bytes);
        assert_eq!(message, $message);
        assert!(matches!(error, $variant), "{error:?}");
    }};
}

/// Where the first metadata pair, or the first tensor of a file without metadata, starts.
const BODY: usize = 24;

#[test]
fn wrong_magic() {
    assert_refused!(
        *b"GGML\x03\0\0\0",
        E::InvalidHeader { offset: 0, .. },
        "offset 0: expected the magic number GGUF, found `GGML`"
    );
}

#[test]
fn unsupported_versions() {
    for (version, found) in [
        (1, "1 (32-bit counts, obsolete since 2023)"),
        (3u32.swap_bytes(), "3 in big endian byte order"),
        (4, "4"),
        (0, "0"),
    ] {
        let file = Gguf { version, ..Gguf::new() };
        assert_refused!(
            file.bytes(),
            E::UnsupportedVersion { .. },
            format!("GGUF version {found} is not supported; supported: 2 and 3, little endian")
        );
    }
}

#[test]
fn more_tensors_than_the_limit() {
    let file = Gguf { tensor_count: Some(u64::MAX), ..Gguf::new() };
    assert_refused!(
        file.bytes(),
        E::LimitExceeded { offset: 8, .. },
        "offset 8: the number of tensors is 18446744073709551615, more than the limit of 1048576"
    );
}

#[test]
fn more_tensors_than_the_file_can_hold() {
    let file = Gguf { tensor_count: Some(1 << 20), ..Gguf::new() };
    assert_refused!(
        file.bytes(),
        E::Truncated { .. },
        "a header where the number of tensors is 1048576 ends at byte 25165840 but the file has 32 bytes"
    );
}

#[test]
fn more_pairs_than_the_limit() {
    let file = Gguf { pair_count: Some(u64::MAX), ..Gguf::new() };
    assert_refused!(
        file.bytes(),
        E::LimitExceeded { offset: 16, .. },
        "offset 16: the number of metadata pairs is 18446744073709551615, more than the limit of 65536"
    );
}

#[test]
fn more_pairs_than_the_file_can_hold() {
    let file = Gguf { pair_count: Some(9), ..Gguf::new() };
    assert_refused!(
        file.bytes(),
        E::Truncated { .. },
        "a header where the number of metadata pairs is 9 ends at byte 141 but the file has 32 bytes"
    );
}

#[test]
fn too_long_key() {
    let file = Gguf::new().pair(&"k".repeat(1 << 16), 0, &[0]);
    assert_refused!(
        file.bytes(),
        E::LimitExceeded { offset: 24, .. },
        "offset 24: the length of a metadata key is 65536, more than the limit of 65535"
    );
}

#[test]
fn key_that_is_not_utf8() {
    let mut file = Gguf::new();
    file.pairs.push([raw_string(3, b"ok\xff"), vec![0, 0, 0, 0, 1]].concat());
    assert_refused!(
        file.bytes(),
        E::InvalidHeader { offset: 34, .. },
        "offset 34: a metadata key is not UTF-8"
    );
}

#[test]
fn repeated_key() {
    let file = Gguf::new().pair("k", 0, &[1]).pair("k", 8, &string("x"));
    let offset = BODY + pair("k", 0, &[1]).len();
    assert_refused!(
        file.bytes(),
        E::DuplicateKey { .. },
        format!("offset {offset}: metadata key `k` appears twice")
    );
}

#[test]
fn unknown_value_type() {
    assert_refused!(
        Gguf::new().pair("k", 13, &[0]).bytes(),
        E::InvalidHeader { offset: 33, .. },
        "offset 33: metadata key `k`: expected a value type from 0 to 12, found 13"
    );
    assert_refused!(
        Gguf::new().pair("k", 9, &array(13, 0, &[])).bytes(),
        E::InvalidHeader { offset: 37, .. },
        "offset 37: metadata key `k`: expected a value type from 0 to 12, found 13"
    );
}

#[test]
fn array_of_arrays() {
    assert_refused!(
        Gguf::new().pair("k", 9, &array(9, 1, &array(0, 1, &[1]))).bytes(),
        E::InvalidHeader { offset: 37, .. },
        "offset 37: metadata key `k` is an array of arrays, which llama.cpp does not read either"
    );
}

#[test]
fn bool_that_is_neither_0_nor_1() {
    assert_refused!(
        Gguf::new().pair("k", 7, &[2]).bytes(),
        E::InvalidHeader { offset: 37, .. },
        "offset 37: the value of metadata key `k`: expected a bool of 0 or 1, found 2"
    );
    assert_refused!(
        Gguf::new().pair("k", 9, &array(7, 3, &[0, 1, 255])).bytes(),
        E::InvalidHeader { offset: 51, .. },
        "offset 51: the array at metadata key `k`: expected a bool of 0 or 1, found 255"
    );
}

#[test]
fn too_long_string() {
    assert_refused!(
        Gguf::new().pair("k", 8, &raw_string(u64::MAX, b"x")).bytes(),
        E::LimitExceeded { offset: 37, .. },
        "offset 37: the length of a metadata string is 18446744073709551615, more than the limit of 1073741824"
    );
}

#[test]
fn string_longer_than_the_file() {
    assert_refused!(
        Gguf::new().pair("k", 8, &raw_string(1 << 30, b"x")).header(),
        E::Truncated { expected: 1_073_741_869, found: 46, .. },
        "a metadata string ends at byte 1073741869 but the file has 46 bytes"
    );
}

#[test]
fn string_that_is_not_utf8() {
    let strings = [raw_string(1, b"a"), raw_string(2, b"\xc3(")].concat();
    assert_refused!(
        Gguf::new().pair("k", 9, &array(8, 2, &strings)).bytes(),
        E::InvalidHeader { offset: 66, .. },
        "offset 66: a metadata string is not UTF-8"
    );
}

#[test]
fn too_long_array() {
    assert_refused!(
        Gguf::new().pair("k", 9, &array(0, u64::MAX, &[1])).bytes(),
        E::LimitExceeded { offset: 41, .. },
        "offset 41: the length of an array is 18446744073709551615, more than the limit of 1073741824"
    );
}

#[test]
fn array_longer_than_the_file() {
    for element_type in [0, 7, 12] {
        assert_refused!(
            Gguf::new().pair("k", 9, &array(element_type, 1 << 30, &[1])).header(),
            E::Truncated { .. },
            "a header where the length of an array is 1073741824 ends at byte 1073741873 but the file has 50 bytes"
        );
    }
    assert_refused!(
        Gguf::new().pair("k", 9, &array(8, 1 << 30, &[1])).header(),
        E::Truncated { .. },
        "a header where the length of an array is 1073741824 ends at byte 8589934641 but the file has 50 bytes"
    );
    assert_refused!(
        Gguf::new().pair("k", 9, &array(12, 2, &[0; 15])).header(),
        E::Truncated { .. },
        "the array at metadata key `k` ends at byte 65 but the file has 64 bytes"
    );
}

#[test]
fn illegal_alignment() {
    for found in [0u32, 4, 24] {
        let file = Gguf::new().pair("general.alignment", 4, &found.to_le_bytes());
        assert_refused!(
            file.bytes(),
            E::InvalidHeader { .. },
            format!(
                "offset 57: `general.alignment`: expected a power of two from 8 to 2^31, found {found}"
            )
        );
    }
    assert_refused!(
        Gguf::new().pair("general.alignment", 6, &32f32.to_le_bytes()).bytes(),
        E::WrongValueType { .. },
        "metadata key `general.alignment`: expected non-negative integer, found f32"
    );
}

#[test]
fn too_long_tensor_name() {
    assert_refused!(
        Gguf::new().tensor(&"n".repeat(64), &[1], 0, 0).data(4).bytes(),
        E::LimitExceeded { offset: 24, .. },
        "offset 24: the length of a tensor name is 64, more than the limit of 63"
    );
    assert!(read(&Gguf::new().tensor(&"n".repeat(63), &[1], 0, 0).data(4).bytes()).is_ok());
}

#[test]
fn tensor_name_that_is_not_utf8() {
    let mut file = Gguf::new().tensor("abc", &[1], 0, 0).data(4);
    file.tensors[0][9] = 0x80;
    assert_refused!(
        file.bytes(),
        E::InvalidHeader { offset: 33, .. },
        "offset 33: a tensor name is not UTF-8"
    );
}

#[test]
fn too_many_dimensions() {
    assert_refused!(
        Gguf::new().tensor("t", &[1; 5], 0, 0).data(4).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: expected at most 4 dimensions, found 5"
    );
}

#[test]
fn dimension_of_zero() {
    assert_refused!(
        Gguf::new().tensor("t", &[4, 0], 0, 0).data(4).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: shape [0, 4] has a dimension of zero"
    );
}

#[test]
fn element_count_that_overflows() {
    assert_refused!(
        Gguf::new().tensor("t", &[1 << 32, 1 << 32], 0, 0).data(4).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: the number of elements of shape [4294967296, 4294967296] overflows"
    );
}

#[test]
fn byte_count_that_overflows() {
    assert_refused!(
        Gguf::new().tensor("t", &[1 << 32, 1 << 31], 0, 0).data(4).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: the size of shape [2147483648, 4294967296] overflows"
    );
    assert_refused!(
        Gguf::new().tensor("t", &[(1 << 32) - 32, 1 << 32], 8, 0).data(4).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: the size of shape [4294967296, 4294967264] overflows"
    );
}

#[test]
fn unsupported_tensor_types() {
    for (id, found) in [
        (4, "4 (Q4_2, removed from ggml)"),
        (20, "20 (IQ4_NL)"),
        (34, "34 (TQ1_0)"),
        (40, "40 (NVFP4)"),
        (99, "99 (unknown to this version)"),
    ] {
        assert_refused!(
            Gguf::new().tensor("t", &[256], id, 0).data(256).bytes(),
            E::UnsupportedType { .. },
            format!(
                "tensor `t` has the unsupported type {found}; supported: F32, F16, Q4_0, Q4_1, Q5_0, \
                 Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16, MXFP4"
            )
        );
    }
}

#[test]
fn row_of_broken_blocks() {
    assert_refused!(
        Gguf::new().tensor("t", &[48, 2], 8, 0).data(512).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: a row of 48 elements is not a whole number of Q8_0 blocks of 32"
    );
}

#[test]
fn misaligned_offset() {
    assert_refused!(
        Gguf::new().tensor("t", &[1], 0, 16).data(64).bytes(),
        E::InvalidTensor { .. },
        "tensor `t`: offset 16 is not a multiple of the alignment 32"
    );
}

#[test]
fn offset_that_overflows() {
    let offset = u64::MAX - 31;
    assert_refused!(
        Gguf::new().tensor("t", &[1], 0, offset).data(64).bytes(),
        E::InvalidTensor { .. },
        format!("tensor `t`: offset {offset} and length 4 overflow")
    );
}

#[test]
fn tensor_beyond_the_end() {
    let file = Gguf::new().tensor("t", &[8, 2], 0, 32).data(95);
    let start = file.header().len().next_multiple_of(32) as u64;
    assert_refused!(
        file.bytes(),
        E::Truncated { .. },
        format!("tensor `t` ends at byte {} but the file has {} bytes", start + 96, start + 95)
    );
}

#[test]
fn overlapping_tensors() {
    let file = Gguf::new().tensor("b", &[8], 0, 32).tensor("a", &[9], 0, 0).data(64);
    let start = file.header().len().next_multiple_of(32);
    assert_refused!(
        file.bytes(),
        E::InvalidTensor { .. },
        format!(
            "tensor `b`: starts at byte {} inside tensor `a` (bytes {start}..{})",
            start + 32,
            start + 36
        )
    );
}

#[test]
fn repeated_tensor_name() {
    assert_refused!(
        Gguf::new().tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64).bytes(),
        E::DuplicateTensor { .. },
        "tensor `t` appears twice"
    );
}
