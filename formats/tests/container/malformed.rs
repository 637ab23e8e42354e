//! Files that are wrong in one way each: the defect is named, and nothing panics.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use sparsepack_formats::{
    CheckpointReader, DType, FormatError,
    container::{ContainerLayout, OriginalFile},
    open,
};

use crate::builder::{create, dense, edited, footer, index, layout, message, noise, put_all, read};

/// Two tensors and a file.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        dense("a", DType::Bf16, &[4, 16], noise(1, 128, 2)),
        dense("b", DType::U8, &[40], noise(2, 40, 0)),
    ];
    let files = vec![OriginalFile::whole("config.json", b"{}".to_vec())];
    let mut writer = create(dir.path(), ContainerLayout { files, ..layout(&tensors) });
    put_all(writer.as_mut(), &tensors);
    std::fs::read(&writer.finish().unwrap()[0].path).unwrap()
});

fn refusal(bytes: &[u8]) -> (FormatError, String) {
    let dir = tempfile::tempdir().unwrap();
    let error = read(dir.path(), bytes).unwrap_err();
    let message = message(dir.path(), &error);
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
fn the_header_is_checked() {
    refused!(
        GOOD[..23],
        Truncated,
        "model.spz: the header ends at byte 24 but the file has 23 bytes"
    );
    let with = |at: usize, byte: u8| {
        let mut bytes = GOOD.clone();
        bytes[at] = byte;
        bytes
    };
    for at in [0, 8, 15] {
        refused!(
            with(at, b'?'),
            InvalidHeader,
            "model.spz: offset 0: expected the magic bytes of a sparsepack container"
        );
    }
    refused!(
        with(16, 2),
        UnsupportedVersion,
        "model.spz: sparsepack container version 2 is not supported; supported: 1"
    );
    for at in [4, 20] {
        refused!(
            with(at, 0x11),
            InvalidHeader,
            "model.spz: offset 4: the header is not the one of version 1"
        );
    }
    // By content, whatever the name; another magic is not one of ours.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("weights"), &*GOOD).unwrap();
    assert_eq!(open(&dir.path().join("weights")).unwrap().tensors().len(), 2);
    std::fs::write(dir.path().join("weights"), with(8, b'?')).unwrap();
    let error = open(&dir.path().join("weights")).unwrap_err();
    assert!(matches!(error, FormatError::UnknownFormat { .. }), "{error}");
}

#[test]
fn the_footer_is_checked() {
    let size = GOOD.len();
    let (start, _) = index(&GOOD);
    for cut in [1, 40, size - start, size - 24] {
        refused!(
            GOOD[..size - cut],
            InvalidHeader,
            format!(
                "model.spz: offset {}: expected the end of a footer; the file is cut short or was never finished",
                size - cut - 8
            )
        );
    }
    let with_length = |length: u64| {
        let mut bytes = GOOD.clone();
        bytes[size - 16..size - 8].copy_from_slice(&length.to_le_bytes());
        bytes
    };
    refused!(
        with_length(u64::MAX),
        LimitExceeded,
        format!(
            "model.spz: offset {}: the length of the index is 18446744073709551615, more than the limit of 1073741824",
            size - 16
        )
    );
    for length in [1 << 20, size as u64 - 56 - 23] {
        refused!(
            with_length(length),
            InvalidHeader,
            format!(
                "model.spz: offset {}: the index has {length} bytes, more than the file has room for",
                size - 16
            )
        );
    }
    refused!(
        with_length(10),
        InvalidHeader,
        format!("model.spz: offset {}: expected the footer", size - 66)
    );
    let mut bytes = GOOD.clone();
    bytes[start + 20] ^= 1;
    let (error, message) = refusal(&bytes);
    assert!(matches!(error, FormatError::InvalidHeader { .. }));
    assert!(message.starts_with(&format!("model.spz: offset {start}: the index has sha256 ")));
    assert!(message.ends_with(", which is not the one behind it"), "{message}");

    let other = [&GOOD[..start], &footer(b"{\"chunk_bytes\": 8, \"tensors\": 7}")].concat();
    let (_, message) = refusal(&other);
    assert!(
        message.starts_with(&format!(
            "model.spz: offset {}: the index is not valid: invalid type: integer `7`",
            start + 8
        )),
        "{message}"
    );
}

/// The good file with the first tensor's entry edited.
fn entry(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    edited(&GOOD, |index| edit(&mut index["tensors"][0]))
}

fn chunk(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    entry(|entry| edit(&mut entry["components"][0]["chunks"][0]))
}

#[test]
fn entries_are_checked() {
    refused!(
        edited(&GOOD, |index| index["tensors"][1]["name"] = "a".into()),
        DuplicateTensor,
        "model.spz: tensor `a` appears twice"
    );
    refused!(
        entry(|entry| entry["name"] = "".into()),
        InvalidTensor,
        "model.spz: tensor ``: the name is empty"
    );
    refused!(
        entry(|entry| entry["shape"] = json!([u64::MAX / 2, 16])),
        Encoding,
        "tensor `a`: the size of shape [9223372036854775807, 16] overflows"
    );
    // A bomb: far more values than the frames can be made of.
    refused!(
        entry(|entry| entry["shape"] = json!([1u64 << 40, 16])),
        InvalidTensor,
        "model.spz: tensor `a`: 35184372088832 bytes in 1 chunks of 2097152, expected 16777216 chunks"
    );
    refused!(
        entry(|entry| entry["components"] = json!([])),
        InvalidTensor,
        "model.spz: tensor `a`: has 0 components, expected 1"
    );
    refused!(
        chunk(|chunk| chunk["mask"] = false.into()),
        InvalidTensor,
        "model.spz: tensor `a`: the chunk at offset 24 has 3 frames, expected 2"
    );
    refused!(
        entry(|entry| entry["components"][0]["sha256"] = "0".repeat(64).into()),
        InvalidTensor,
        format!(
            "model.spz: tensor `a`: its record at offset {} differs from the index",
            24 + frames(0).iter().sum::<u64>()
        )
    );
    for bytes in [0u64, 12, 1 << 40] {
        refused!(
            edited(&GOOD, |index| index["chunk_bytes"] = bytes.into()),
            InvalidHeader,
            format!(
                "model.spz: offset {}: chunks of {bytes} bytes, expected a multiple of 8 up to 67108864",
                index(&GOOD).0
            )
        );
    }
}

fn frames(tensor: usize) -> Vec<u64> {
    let (_, index) = index(&GOOD);
    let frames = &index["tensors"][tensor]["components"][0]["chunks"][0]["frames"];
    frames.as_array().unwrap().iter().map(|length| length.as_u64().unwrap()).collect()
}

#[test]
fn frames_must_tile_the_file() {
    refused!(
        chunk(|chunk| chunk["offset"] = 20.into()),
        InvalidTensor,
        "model.spz: tensor `a`: a frame overlaps what is before it: expected offset 24, found 20"
    );
    refused!(
        chunk(|chunk| chunk["offset"] = 31.into()),
        InvalidTensor,
        "model.spz: tensor `a`: a frame leaves a gap after what is before it: expected offset 24, found 31"
    );
    refused!(
        chunk(|chunk| chunk["frames"][1] = u32::MAX.into()),
        Truncated,
        format!(
            "model.spz: tensor `a` ends at byte {} but the file has {} bytes",
            24 + u64::from(u32::MAX) + frames(0)[0] + frames(0)[2],
            index(&GOOD).0
        )
    );
    refused!(
        chunk(|chunk| chunk["frames"][1] = 1.into()),
        InvalidTensor,
        format!(
            "model.spz: tensor `a`: its record at offset {} differs from the index",
            25 + frames(0)[0] + frames(0)[2]
        )
    );
    let second = index(&GOOD).1["tensors"][1]["components"][0]["chunks"][0]["offset"].clone();
    refused!(
        edited(&GOOD, |index| drop(index["tensors"].as_array_mut().unwrap().remove(0))),
        InvalidTensor,
        format!(
            "model.spz: tensor `b`: a frame leaves a gap after what is before it: expected offset 24, found {second}"
        )
    );
    let file = index(&GOOD).1["files"][0]["offset"].as_u64().unwrap();
    refused!(
        edited(&GOOD, |index| index["files"] = json!([])),
        InvalidHeader,
        format!(
            "model.spz: offset {file}: expected the footer here, found it at offset {}",
            index(&GOOD).0
        )
    );
    refused!(
        edited(&GOOD, |index| index["files"][0]["offset"] = (file + 1).into()),
        InvalidHeader,
        format!(
            "model.spz: offset {}: the file `config.json` begins here, expected offset {file}",
            file + 1
        )
    );
}

#[test]
fn described_files_are_checked() {
    let end = index(&GOOD).0;
    let file = |edit: &dyn Fn(&mut Value)| edited(&GOOD, |index| edit(&mut index["files"][0]));
    refused!(
        file(&|file| file["name"] = "../config.json".into()),
        InvalidHeader,
        format!("model.spz: offset {end}: the file name \"../config.json\" is not allowed")
    );
    refused!(
        file(&|file| file["head"] = 3.into()),
        LimitExceeded,
        format!("model.spz: offset {end}: the start of a file is 3, more than the limit of 2")
    );
    refused!(
        edited(&GOOD, |index| {
            let twice = index["files"][0].clone();
            index["files"].as_array_mut().unwrap().push(twice);
        }),
        InvalidHeader,
        format!("model.spz: offset {end}: the file `config.json` appears twice")
    );
    let at = index(&GOOD).1["files"][0]["offset"].as_u64().unwrap();
    let originals = |bytes: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path(), bytes).unwrap().original_files().unwrap_err();
        message(dir.path(), &error)
    };
    assert_eq!(
        originals(&file(&|file| {
            file["head"] = 90_000_000.into();
            file["bytes"] = 90_000_000.into();
        })),
        format!(
            "model.spz: offset {at}: the start of `config.json`: holds 2 bytes by its own header, expected 90000000"
        )
    );
    assert_eq!(
        originals(&file(&|file| file["sha256"] = "0".repeat(64).into())),
        format!(
            "model.spz: offset {at}: the start of `config.json`: does not have the recorded sha256"
        )
    );
}

#[test]
fn a_damaged_frame_names_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let first = frames(0);
    for (at, offset) in [(24 + 11, 24), (24 + first[0] + 12, 24 + first[0])] {
        let mut bytes = GOOD.clone();
        bytes[at as usize] ^= 4;
        let reader = read(dir.path(), &bytes).unwrap();
        let error = message(dir.path(), &reader.components("a").unwrap_err());
        let expected = format!("model.spz: tensor `a`: the frame at offset {offset}: ");
        assert!(error.starts_with(&expected), "{error}");
        assert!(reader.components("b").is_ok());
        assert!(reader.read_f32("a").is_err());
    }
    let reader = read(dir.path(), &GOOD).unwrap();
    let beyond = message(dir.path(), &reader.read_component("b", 0, 30..41).unwrap_err());
    assert_eq!(beyond, "model.spz: tensor `b`: bytes 30..41 of component 0 are beyond its end");
    assert!(reader.read_component("b", 1, 0..1).is_err());
    let error = message(dir.path(), &reader.rows("a", 3..5).unwrap_err());
    assert_eq!(error, "tensor `a`: rows 3..5 of 4 asked for");
    let error = message(dir.path(), &reader.components("c").unwrap_err());
    assert_eq!(error, "model.spz: tensor `c` not found");
}

#[test]
fn rows_without_columns_cost_nothing_however_many() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = dense("t", DType::F32, &[1 << 60, 0], vec![]);
    create(dir.path(), layout(&[tensor])).finish().unwrap();
    let reader = crate::builder::open(dir.path()).unwrap();
    assert_eq!(reader.components("t").unwrap(), [Vec::<u8>::new()]);
    assert_eq!(reader.read_f32("t").unwrap(), [0.0; 0]);
}

#[test]
fn a_directory_with_two_kinds_of_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    std::fs::write(path.join("model.spz"), &*GOOD).unwrap();
    let error = message(path, &open(path).unwrap_err());
    assert!(error.contains("a directory without config.json"), "{error}");
    std::fs::write(path.join("config.json"), "{}").unwrap();
    assert_eq!(open(path).unwrap().tensors().len(), 2);
    std::fs::write(path.join("model.safetensors"), "").unwrap();
    let error = message(path, &open(path).unwrap_err());
    assert!(error.contains("a directory with both model.spz and safetensors"), "{error}");
}

/// Opens a file of these bytes and reads all of it.
fn read_all(dir: &tempfile::TempDir, bytes: &[u8]) -> bool {
    let Ok(reader) = read(dir.path(), bytes) else { return false };
    let names: Vec<String> = reader.tensors().iter().map(|info| info.name.clone()).collect();
    let mut fine = reader.original_files().is_ok();
    for name in &names {
        fine &= reader.components(name).is_ok();
        let _ = reader.read_f32(name);
    }
    fine
}

#[test]
fn every_truncation_and_every_flipped_bit_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    assert!(read_all(&dir, &GOOD));
    for len in 0..GOOD.len() {
        assert!(!read_all(&dir, &GOOD[..len]), "{len} of {} bytes", GOOD.len());
    }
    // A bit of each frame's descriptor that zstd leaves undefined and decoders pass over (RFC 8878,
    // section 3.1.1.1.1.3).
    let descriptors: Vec<usize> =
        (0..GOOD.len()).filter(|&at| GOOD[..at].ends_with(&[0x28, 0xb5, 0x2f, 0xfd])).collect();
    assert_eq!(descriptors.len(), 3 + 1 + 1);
    let mut bytes = GOOD.clone();
    for at in 0..bytes.len() {
        let bit = at % 8;
        bytes[at] ^= 1 << bit;
        let undefined = bit == 4 && descriptors.contains(&at);
        assert_eq!(read_all(&dir, &bytes), undefined, "bit {bit} of byte {at}");
        bytes[at] = GOOD[at];
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_are_read_or_refused(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        header: bool,
        json in "[\\[\\]{}\":,a-z0-9 ]{0,200}",
    ) {
        let dir = tempfile::tempdir().unwrap();
        if header {
            bytes.splice(0..0, GOOD[..24].iter().copied());
        }
        read_all(&dir, &bytes);
        bytes.extend(footer(json.as_bytes()));
        read_all(&dir, &bytes);
    }

    #[test]
    fn any_numbers_in_an_index_are_read_or_refused(
        offset in prop_oneof![0u64..500, any::<u64>()],
        frames in proptest::collection::vec(prop_oneof![0u32..200, any::<u32>()], 0..5),
        shape in proptest::collection::vec(prop_oneof![0usize..70, any::<usize>()], 0..4),
        mask: bool,
        chunk_bytes in prop_oneof![(0u64..40).prop_map(|n| n * 8), any::<u64>()],
        second: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let bytes = edited(&GOOD, |index| {
            index["chunk_bytes"] = chunk_bytes.into();
            let entry = &mut index["tensors"][usize::from(second)];
            entry["shape"] = json!(shape);
            entry["components"][0]["chunks"][0] =
                json!({"offset": offset, "mask": mask, "frames": frames});
        });
        read_all(&dir, &bytes);
    }
}
