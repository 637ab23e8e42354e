//! Files that are wrong in one way each: the defect is named, and nothing panics.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

use std::path::Path;

use proptest::prelude::*;
use sparsepack_formats::{
    CheckpointReader, DType, Encoding, FormatError, MappedFile, Result, SafetensorsWriter,
    ShardLayout, open, safetensors::SafetensorsReader,
};
use tempfile::TempDir;

/// A file of this header and `data` bytes of zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn read(dir: &TempDir, bytes: &[u8]) -> Result<SafetensorsReader> {
    let path = dir.path().join("m.safetensors");
    std::fs::write(&path, bytes).unwrap();
    SafetensorsReader::open_file(MappedFile::open(&path).unwrap())
}

/// The error without the directory, which differs from run to run.
fn strip(dir: &Path, error: &FormatError) -> String {
    error.to_string().replace(&format!("{}/", dir.display()), "")
}

fn refusal(bytes: &[u8]) -> (FormatError, String) {
    let dir = tempfile::tempdir().unwrap();
    let error = read(&dir, bytes).unwrap_err();
    let message = strip(dir.path(), &error);
    (error, message)
}

macro_rules! refused {
    ($bytes:expr, $variant:ident, $message:expr) => {{
        let (error, message) = refusal(&$bytes);
        assert_eq!(message, $message);
        assert!(matches!(error, FormatError::$variant { .. }), "{error:?}");
    }};
}

#[test]
fn truncation_names_the_tensor_the_byte_and_the_size() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    let whole = file(header, 12);
    refused!(
        whole[..whole.len() - 3],
        Truncated,
        format!(
            "m.safetensors: tensor `b` ends at byte {} but the file has {} bytes",
            whole.len(),
            whole.len() - 3
        )
    );
    refused!(
        whole[..40],
        Truncated,
        format!(
            "m.safetensors: the header ends at byte {} but the file has 40 bytes",
            whole.len() - 12
        )
    );
    refused!(
        whole[..7],
        Truncated,
        "m.safetensors: the header length ends at byte 8 but the file has 7 bytes"
    );
    refused!(
        [0u8; 0],
        Truncated,
        "m.safetensors: the header length ends at byte 8 but the file has 0 bytes"
    );
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused!(
        huge,
        LimitExceeded,
        "m.safetensors: offset 0: the header length is 18446744073709551615, more than the limit of 100000000"
    );
    let mut long = whole.clone();
    long.extend([0; 5]);
    refused!(
        long,
        InvalidHeader,
        format!(
            "m.safetensors: offset {}: expected the end of the file, found 5 more bytes",
            whole.len()
        )
    );
}

/// A header of `a: U8 [4]` at 0..4 and `b: U8 [4]` at the given offsets.
fn two(begin: u64, end: u64) -> String {
    format!(
        r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},"b":{{"dtype":"U8","shape":[4],"data_offsets":[{begin},{end}]}}}}"#
    )
}

#[test]
fn offsets_must_tile_the_data() {
    let base = 8 + two(0, 0).len() as u64;
    refused!(
        file(&two(2, 6), 6),
        InvalidTensor,
        format!(
            "m.safetensors: tensor `b`: its data overlaps `a`: expected byte {}, found {}",
            base + 4,
            base + 2
        )
    );
    refused!(
        file(&two(6, 9), 9),
        InvalidTensor,
        "m.safetensors: tensor `b`: shape [4] of U8 needs 4 bytes, but the data offsets [6, 9] hold 3"
    );
    refused!(
        file(&two(5, 9), 9),
        InvalidTensor,
        format!(
            "m.safetensors: tensor `b`: its data leaves a gap after `a`: expected byte {}, found {}",
            base + 4,
            base + 5
        )
    );
    refused!(
        file(&two(8, 4), 8),
        InvalidTensor,
        "m.safetensors: tensor `b`: the data ends at offset 4, before it begins at 8"
    );
    let far = u64::MAX;
    refused!(
        file(&two(far - 4, far), 8),
        Truncated,
        format!(
            "m.safetensors: tensor `b` ends at byte {far} but the file has {} bytes",
            8 + two(far - 4, far).len() + 8
        )
    );
    let overflow = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
    refused!(
        file(overflow, 0),
        InvalidTensor,
        "m.safetensors: tensor `a`: shape [4294967296, 4294967296] of F32 needs more than can be addressed bytes, but the data offsets [0, 0] hold 0"
    );
}

#[test]
fn names_and_types_are_checked() {
    let one = |name: &str, dtype: &str| {
        format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,1]}}}}"#)
    };
    let twice = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    refused!(file(twice, 2), DuplicateTensor, "m.safetensors: tensor `a` appears twice");
    refused!(
        file(&one("a", "F8_E5M2"), 1),
        UnsupportedType,
        "m.safetensors: tensor `a` has the unsupported type F8_E5M2; supported: BOOL, U8, I8, F8_E4M3, I16, U16, F16, BF16, I32, U32, F32, I64, U64, F64"
    );
    refused!(file(&one("", "U8"), 1), InvalidTensor, "m.safetensors: tensor ``: the name is empty");
    refused!(
        file(&one(r"a\u0000b", "U8"), 1),
        InvalidTensor,
        "m.safetensors: tensor `a\0b`: the name holds the control character '\\0'"
    );
    let (_, message) = refusal(&file(&one(&"n".repeat(4097), "U8"), 1));
    assert!(message.ends_with("the name has 4097 bytes, more than 4096"));
    let dir = tempfile::tempdir().unwrap();
    assert!(read(&dir, &file(&one("../etc/x", "U8"), 1)).is_ok(), "a name is not a path");
}

#[test]
fn headers_that_are_not_the_expected_json_are_refused() {
    refused!(
        file(r#" {"a":1}"#, 0),
        InvalidHeader,
        "m.safetensors: offset 8: the header does not start with `{`"
    );
    refused!(
        file(r#"{"a":"#, 0),
        InvalidTensor,
        "m.safetensors: tensor `a`: offset 12: EOF while parsing a value"
    );
    refused!(
        file("{]", 0),
        InvalidHeader,
        "m.safetensors: offset 9: the header is not valid: key must be a string"
    );
    refused!(
        file("{}{}", 0),
        InvalidHeader,
        "m.safetensors: offset 10: the header is not valid: trailing characters"
    );
    let mut not_text = file(r#"{"ab":1}"#, 0);
    not_text[11] = 0xFF;
    refused!(not_text, InvalidHeader, "m.safetensors: offset 11: the header is not UTF-8");
    refused!(
        file("{\n\"a\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,0]}}", 0),
        InvalidTensor,
        "m.safetensors: tensor `a`: offset 38: invalid value: integer `-1`, expected usize"
    );
    refused!(
        file(r#"{"a":{"dtype":"U8","shape":[0]}}"#, 0),
        InvalidTensor,
        "m.safetensors: tensor `a`: offset 38: missing field `data_offsets`"
    );
    refused!(
        file(r#"{"__metadata__":{"k":1}}"#, 0),
        InvalidHeader,
        "m.safetensors: offset 29: the header is not valid: invalid type: integer `1`, expected a string"
    );
    let (_, message) = refusal(&file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0));
    assert!(message.ends_with("the header is not valid: key `k` appears twice"), "{message}");
    let (_, message) = refusal(&file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0));
    assert!(
        message.ends_with("the header is not valid: `__metadata__` appears twice"),
        "{message}"
    );
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    assert!(matches!(refusal(&file(&deep, 0)).0, FormatError::InvalidTensor { .. }));
}

#[test]
fn a_million_empty_tensors_are_too_many() {
    let tensors: Vec<String> = (0..500_001)
        .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    refused!(
        file(&format!("{{{}}}", tensors.join(",")), 0),
        LimitExceeded,
        "m.safetensors: offset 8: the number of tensors is 500001, more than the limit of 500000"
    );
}

/// A file that declares `w` as 2:4 BF16 [1, 8], with these stored tensors and declaration.
fn packed(stored: &[(&str, &str, &[usize], usize)], declaration: &str) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header
        .insert("__metadata__".into(), serde_json::json!({ "sparsepack.encodings": declaration }));
    let mut end = 0;
    for &(name, dtype, shape, bytes) in stored {
        let offsets = [end, end + bytes];
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.into(), entry);
        end += bytes;
    }
    file(&serde_json::Value::from(header).to_string(), end)
}

#[test]
fn components_of_packed_tensors_are_checked() {
    type Stored<'a> = (&'a str, &'a str, &'a [usize], usize);
    const W: &str = r#"{"w":{"encoding":"sparse24","dtype":"BF16","shape":[1,8]}}"#;
    let values: Stored = ("w.values", "BF16", &[1, 4], 8);
    let metadata: Stored = ("w.metadata", "U8", &[1, 1], 1);
    let dir = tempfile::tempdir().unwrap();
    let mut good = packed(&[values, metadata], W);
    let reader = read(&dir, &good).unwrap();
    let error = reader.read_f32("w").unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `w.metadata`: row 0, columns 0 to 3: metadata nibble 0x0 is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe"
    );
    drop(reader);
    *good.last_mut().unwrap() = 0xE4;
    assert_eq!(read(&dir, &good).unwrap().read_f32("w").unwrap().len(), 8);

    refused!(
        packed(&[values], W),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.metadata` is missing"
    );
    refused!(
        packed(&[("w.values", "BF16", &[1, 2], 4), metadata], W),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.values` is BF16 [1, 2]; expected BF16 [1, 4]"
    );
    refused!(
        packed(&[("w.values", "F16", &[1, 4], 8), metadata], W),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.values` is F16 [1, 4]; expected BF16 [1, 4]"
    );
    refused!(
        packed(&[values, metadata, ("w.scale", "U8", &[1], 1)], W),
        InvalidTensor,
        "m.safetensors: tensor `w`: `w.scale` is stored but is not one of its components"
    );
    refused!(
        packed(&[values, metadata, ("w", "U8", &[1], 1)], W),
        InvalidTensor,
        "m.safetensors: tensor `w`: `w` is stored but is not one of its components"
    );
    refused!(
        packed(&[values, metadata], r#"{"w":{"encoding":"dense","dtype":"BF16","shape":[1,8]}}"#),
        InvalidTensor,
        "m.safetensors: tensor `w`: the encoding BF16 cannot be declared in a safetensors file; expected sparse24, nm, bitmask, torch-cutlass or int"
    );
    refused!(
        packed(
            &[values, metadata],
            r#"{"w":{"encoding":"sparse24","dtype":"BF16","shape":[1,6]}}"#
        ),
        Encoding,
        "tensor `w`: 2:4 needs a multiple of 4 columns, found 6"
    );
    for declaration in ["", "[]", r#"{"w":{"encoding":"sparse25"}}"#, r#"{"w":{"dtype":"BF16"}}"#] {
        let (error, message) = refusal(&packed(&[values, metadata], declaration));
        assert!(matches!(error, FormatError::InvalidHeader { .. }), "{error:?}");
        assert!(
            message.starts_with(
                "m.safetensors: offset 8: `sparsepack.encodings` in `__metadata__` is not valid: "
            ),
            "{message}"
        );
    }
    // Not declared, the components are ordinary tensors.
    assert_eq!(read(&dir, &packed(&[values, metadata], "{}")).unwrap().tensors().len(), 2);
}

#[test]
fn components_of_nm_and_bitmask_tensors_are_checked() {
    type Stored<'a> = (&'a str, &'a str, &'a [usize], usize);
    const NM: &str = r#"{"w":{"encoding":"nm","n":1,"m":4,"dtype":"F8_E4M3","shape":[2,12]}}"#;
    const BITMASK: &str = r#"{"w":{"encoding":"bitmask","dtype":"F16","kept":3,"shape":[2,12]}}"#;
    let nm: [Stored; 2] = [("w.values", "F8_E4M3", &[2, 3], 6), ("w.mask", "U8", &[2, 2], 4)];
    let bitmask: [Stored; 3] = [
        ("w.offsets", "U64", &[2], 16),
        ("w.values", "F16", &[3], 6),
        ("w.mask", "U8", &[2, 2], 4),
    ];
    let dir = tempfile::tempdir().unwrap();
    let reader = read(&dir, &packed(&nm, NM)).unwrap();
    assert_eq!(
        reader.read_f32("w").unwrap_err().to_string(),
        "tensor `w.mask`: row 0, columns 0 to 3: the mask keeps 0, expected 1"
    );
    drop(reader);
    // Nothing is kept: the room for values is all padding.
    let mut good = packed(&bitmask, BITMASK);
    assert_eq!(read(&dir, &good).unwrap().read_f32("w").unwrap(), [0.0; 24]);
    *good.last_mut().unwrap() = 1;
    let reader = read(&dir, &good).unwrap();
    assert_eq!(
        reader.read_f32("w").unwrap_err().to_string(),
        "tensor `w.offsets`: rows 0 to 1: bitmask count not matching values (the mask keeps 1, the offsets are 0 and 0 of 3)"
    );
    drop(reader);

    refused!(
        packed(&bitmask[..2], BITMASK),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.mask` is missing"
    );
    refused!(
        packed(&[bitmask[0], ("w.values", "F16", &[4], 8), bitmask[2]], BITMASK),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.values` is F16 [4]; expected F16 [3]"
    );
    refused!(
        packed(&[("w.offsets", "U64", &[3], 24), bitmask[1], bitmask[2]], BITMASK),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.offsets` is U64 [3]; expected U64 [2]"
    );
    refused!(
        packed(&[nm[0], ("w.mask", "I8", &[2, 2], 4)], NM),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.mask` is I8 [2, 2]; expected U8 [2, 2]"
    );
    for (change, message) in [
        ((r#""m":4"#, r#""m":5"#), "1:5 needs a multiple of 5 columns, found 12"),
        ((r#""m":4"#, r#""m":24"#), "the pattern is 1:24; expected 1 <= n < m <= 16"),
        ((r#""n":1"#, r#""n":2"#), "the encoding nm does not hold 2:4; expected sparse24"),
        ((r#""n":1"#, r#""n":0"#), "the pattern is 0:4; expected 1 <= n < m <= 16"),
        (
            ("F8_E4M3", "BOOL"),
            "1:4 values of type BOOL; expected F32, F16, BF16, F8_E4M3, I8 or U8",
        ),
    ] {
        refused!(
            packed(&nm, &NM.replace(change.0, change.1)),
            Encoding,
            format!("tensor `w`: {message}")
        );
    }
    refused!(
        packed(&bitmask, &BITMASK.replace(r#""kept":3"#, r#""kept":25"#)),
        Encoding,
        "tensor `w`: 25 kept values of 24 elements"
    );
    for broken in [
        BITMASK.replace(r#""kept":3"#, r#""kept":-1"#),
        BITMASK.replace(r#""kept":3,"#, ""),
        NM.replace(r#""n":1"#, r#""n":256"#),
    ] {
        assert!(matches!(refusal(&packed(&nm, &broken)).0, FormatError::InvalidHeader { .. }));
    }
}

#[test]
fn components_of_quantized_tensors_are_checked() {
    type Stored<'a> = (&'a str, &'a str, &'a [usize], usize);
    const W: &str = r#"{"w":{"encoding":"int","bits":4,"group_size":4,"symmetric":false,"dtype":"F16","kept":"bitmask","room":5,"shape":[2,12]}}"#;
    let parts: [Stored; 5] = [
        ("w.offsets", "U64", &[2], 16),
        ("w.scales", "F16", &[2, 3], 12),
        ("w.codes", "U8", &[3], 3),
        ("w.mask", "U8", &[2, 2], 4),
        ("w.zero_points", "U8", &[2, 2], 4),
    ];
    let with = |at: usize, part: Stored| {
        let mut parts = parts.to_vec();
        parts[at] = (parts[at].0, part.1, part.2, part.3);
        packed(&parts, W)
    };
    let dir = tempfile::tempdir().unwrap();
    // Nothing is kept, and scales of zero are those of groups of zeros.
    let reader = read(&dir, &packed(&parts, W)).unwrap();
    assert_eq!(reader.read_f32("w").unwrap(), [0.0; 24]);
    drop(reader);
    for (at, name) in parts.iter().map(|part| part.0).enumerate() {
        let mut others = parts.to_vec();
        others.remove(at);
        refused!(
            packed(&others, W),
            InvalidTensor,
            format!("m.safetensors: tensor `w`: its component `{name}` is missing")
        );
    }
    refused!(
        with(1, ("", "BF16", &[2, 3], 12)),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.scales` is BF16 [2, 3]; expected F16 [2, 3]"
    );
    refused!(
        with(2, ("", "U8", &[5], 5)),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.codes` is U8 [5]; expected U8 [3]"
    );
    refused!(
        with(4, ("", "I8", &[2, 3], 6)),
        InvalidTensor,
        "m.safetensors: tensor `w`: its component `w.zero_points` is I8 [2, 3]; expected U8 [2, 2]"
    );
    refused!(
        packed(&parts, &W.replace("false", "true")),
        InvalidTensor,
        "m.safetensors: tensor `w`: `w.zero_points` is stored but is not one of its components"
    );
    for (change, message) in [
        ((r#""bits":4"#, r#""bits":0"#), "codes of 0 bits; expected 2 to 8"),
        ((r#""room":5"#, r#""room":25"#), "25 kept values of 24 elements"),
        (
            (r#""group_size":4"#, r#""group_size":5"#),
            "groups of 5 columns do not divide 12 columns",
        ),
        ((r#""dtype":"F16""#, r#""dtype":"I8""#), "scales of type I8; expected F16, BF16 or F32"),
    ] {
        let declaration = W.replace(change.0, change.1);
        let message = format!("tensor `w`: {message}");
        refused!(packed(&parts, &declaration), Encoding, message);
    }
    for broken in [
        W.replace(r#""room":5,"#, ""),
        W.replace(r#""kept":"bitmask","#, ""),
        W.replace(r#""kept":"bitmask""#, r#""kept":"nm""#),
        W.replace(r#""kept":"bitmask""#, r#""kept":"some""#),
        W.replace(r#""symmetric":false,"#, ""),
        W.replace(r#""bits":4"#, r#""bits":256"#),
        W.replace(r#""group_size":4"#, r#""group_size":-1"#),
    ] {
        let (error, message) = refusal(&packed(&parts, &broken));
        assert!(matches!(error, FormatError::InvalidHeader { .. }), "{broken}: {message}");
    }
}

/// A directory of two shards with `a` in the first and `b` in the second.
fn sharded() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let shard = |name: &str| ShardLayout {
        tensors: vec![(name.to_owned(), Encoding::Dense { dtype: DType::U8 }, vec![1])],
        metadata: [].into(),
    };
    let mut writer = SafetensorsWriter::create(dir.path(), &[shard("a"), shard("b")]).unwrap();
    writer.write("a", 0, &[1]).unwrap();
    writer.write("b", 0, &[2]).unwrap();
    writer.finish().unwrap();
    dir
}

fn with_index(weight_map: &str) -> (FormatError, String) {
    let dir = sharded();
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(index, format!(r#"{{"weight_map":{weight_map}}}"#)).unwrap();
    let error = open(dir.path()).unwrap_err();
    let message = strip(dir.path(), &error);
    (error, message)
}

#[test]
fn the_index_and_the_shards_must_agree() {
    const ONE: &str = "model-00001-of-00002.safetensors";
    const TWO: &str = "model-00002-of-00002.safetensors";
    let index = "model.safetensors.index.json";
    assert!(open(sharded().path()).is_ok());
    for (shard, problem) in [
        ("../x.safetensors", "is not a plain file name"),
        ("/etc/passwd", "is not a plain file name"),
        ("..", "is not a plain file name"),
        ("", "is not a plain file name"),
        ("a\\b", "is not a plain file name"),
        ("gone.safetensors", "does not exist"),
    ] {
        let map = serde_json::json!({ "a": ONE, "b": shard }).to_string();
        let (error, message) = with_index(&map);
        assert!(matches!(error, FormatError::BadShard { .. }), "{error:?}");
        assert_eq!(message, format!("{index}: the index names shard `{shard}`, which {problem}"));
    }
    let cases = [
        (
            format!(r#"{{"a":"{ONE}","b":"{ONE}","c":"{TWO}"}}"#),
            format!("`b`: stored in shard `{TWO}`, but the index names shard `{ONE}`"),
        ),
        (
            format!(r#"{{"b":"{TWO}","c":"{ONE}"}}"#),
            format!("`a`: stored in shard `{ONE}`, but missing from the index"),
        ),
        (
            format!(r#"{{"a":"{ONE}","b":"{TWO}","c":"{TWO}"}}"#),
            format!("`c`: the index names shard `{TWO}`, which does not hold it"),
        ),
    ];
    for (map, expected) in cases {
        let (error, message) = with_index(&map);
        assert!(matches!(error, FormatError::InvalidTensor { .. }), "{error:?}");
        assert_eq!(message, format!("{index}: tensor {expected}"));
    }
    for map in [format!(r#"{{"a":"{ONE}","a":"{TWO}"}}"#), "[]".into(), "{".into()] {
        let (error, message) = with_index(&map);
        assert!(matches!(error, FormatError::Json { .. }), "{error:?}");
        assert_eq!(message, format!("{index}: invalid JSON"));
    }
}

#[test]
fn directories_say_what_is_missing() {
    let dir = sharded();
    let refused = |expected: &str| {
        let error = open(dir.path()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(expected), "{message}");
    };
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    refused("config.json: offset 0: the configuration is not a JSON object");
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    refused("config.json: invalid JSON");
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    refused("(a directory without model.safetensors and model.safetensors.index.json)");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused("(a directory without config.json)");
}

/// A small file with a tensor of each packed encoding and a dense one.
fn sample() -> Vec<u8> {
    packed(
        &[
            ("b.offsets", "U64", &[2], 16),
            ("w.values", "BF16", &[1, 4], 8),
            ("v", "F16", &[2, 1], 4),
            ("w.metadata", "U8", &[1, 1], 1),
            ("b.values", "F8_E4M3", &[2], 2),
            ("b.mask", "U8", &[2, 1], 2),
            ("n.values", "U8", &[1, 2], 2),
            ("n.mask", "U8", &[1, 1], 1),
        ],
        r#"{"w":{"encoding":"sparse24","dtype":"BF16","shape":[1,8]},
            "b":{"encoding":"bitmask","dtype":"F8_E4M3","kept":2,"shape":[2,5]},
            "n":{"encoding":"nm","n":1,"m":3,"dtype":"U8","shape":[1,6]}}"#,
    )
}

/// Opens and reads everything; only a panic is a failure.
fn read_all(dir: &TempDir, bytes: &[u8]) -> bool {
    let Ok(reader) = read(dir, bytes) else { return false };
    let names: Vec<&str> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
    for name in &names {
        let _ = reader.read_f32(name);
    }
    reader.prefetch(&names);
    reader.release(&names);
    true
}

#[test]
fn truncation_at_every_byte_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample();
    assert!(read_all(&dir, &bytes));
    for len in 0..bytes.len() {
        assert!(!read_all(&dir, &bytes[..len]), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn flipped_bits_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample();
    for byte in 0..bytes.len() {
        // Two bits of each byte, other ones from byte to byte: files are what takes time here.
        for bit in [byte % 8, (byte + 3) % 8] {
            let mut flipped = bytes.clone();
            flipped[byte] ^= 1 << bit;
            read_all(&dir, &flipped);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn arbitrary_bytes_are_read_or_refused(
        header in proptest::collection::vec(any::<u8>(), 0..64),
        json in r#"[\{\}\[\]",:0-9a-z_ ]{0,80}"#,
    ) {
        let dir = tempfile::tempdir().unwrap();
        read_all(&dir, &header);
        read_all(&dir, &file(&json, 4));
        read_all(&dir, &file(&format!("{{{json}"), 4));
        let text = String::from_utf8_lossy(&header).into_owned();
        read_all(&dir, &file(&format!(r#"{{"__metadata__":{{"sparsepack.encodings":{text:?}}}}}"#), 0));
    }
}
