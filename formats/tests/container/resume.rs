//! Interrupted writing: what was whole is kept, and the end is the same file.

use std::path::Path;

use sparsepack_formats::{
    CheckpointWriter, DType, Digest,
    container::{CHUNK_BYTES, ContainerLayout, ContainerWriter, FILE_NAME, InPlace},
};

use crate::builder::{Tensor, create, dense, layout, message, noise, put, put_all, write};

fn tensors() -> Vec<Tensor> {
    vec![
        dense("a", DType::Bf16, &[CHUNK_BYTES / 2 + 9], noise(1, CHUNK_BYTES + 18, 2)),
        dense("b", DType::F32, &[4, 4], noise(2, 64, 0)),
        dense("c", DType::U8, &[100], noise(3, 100, 0)),
        dense("empty", DType::U8, &[0], vec![]),
    ]
}

fn part(dir: &Path) -> std::path::PathBuf {
    dir.join(format!("{FILE_NAME}.part"))
}

fn resume(dir: &Path, layout: ContainerLayout) -> Box<dyn CheckpointWriter> {
    ContainerWriter::resume(dir, layout, 1, Box::new(InPlace)).unwrap()
}

fn digests((_, _, _, parts): &Tensor) -> Vec<Digest> {
    parts.iter().map(|part| Digest::of(part)).collect()
}

/// A part with the first `count` tensors in it.
fn interrupted(dir: &Path, count: usize) {
    let tensors = tensors();
    let mut writer = create(dir, layout(&tensors));
    put_all(writer.as_mut(), &tensors[..count]);
    writer.sync().unwrap();
}

#[test]
fn whatever_the_crash_left_behind_the_end_is_the_same_file() {
    let whole = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let expected = write(whole.path(), &tensors);
    let tear = |what: &str, bytes: &mut Vec<u8>| match what {
        "half a record" => bytes.truncate(bytes.len() - 9),
        "half a frame" => bytes.extend([0x28, 0xb5, 0x2f, 0xfd, 0x24, 2]),
        "zeros" => bytes.resize(bytes.len() + 5000, 0),
        _ => {}
    };
    for what in ["as it was", "half a record", "half a frame", "zeros"] {
        for adopted in 0..=1 {
            let dir = tempfile::tempdir().unwrap();
            interrupted(dir.path(), 2);
            let mut bytes = std::fs::read(part(dir.path())).unwrap();
            tear(what, &mut bytes);
            std::fs::write(part(dir.path()), bytes).unwrap();
            let mut writer = resume(dir.path(), layout(&tensors));
            for tensor in tensors[..adopted].iter().chain([&tensors[3]]) {
                writer.adopt(&tensor.0, &digests(tensor)).unwrap();
            }
            put_all(writer.as_mut(), &tensors[adopted..]);
            writer.finish().unwrap();
            assert!(std::fs::read(dir.path().join(FILE_NAME)).unwrap() == expected, "{what}");
            assert!(!part(dir.path()).exists(), "{what}");
        }
    }
}

#[test]
fn a_finished_file_is_finished_again() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let expected = write(dir.path(), &tensors);
    let mut writer = resume(dir.path(), layout(&tensors));
    assert!(!dir.path().join(FILE_NAME).exists());
    for tensor in &tensors {
        writer.adopt(&tensor.0, &digests(tensor)).unwrap();
    }
    writer.finish().unwrap();
    assert!(std::fs::read(dir.path().join(FILE_NAME)).unwrap() == expected);
}

#[test]
fn what_is_not_as_recorded_is_not_adopted() {
    let dir = tempfile::tempdir().unwrap();
    interrupted(dir.path(), 2);
    let tensors = tensors();
    let mut writer = resume(dir.path(), layout(&tensors));
    let mut refused = |name: &str, digests: &[Digest]| {
        message(dir.path(), &writer.adopt(name, digests).unwrap_err())
    };
    let (nothing, b) = (Digest::of(&[]), digests(&tensors[1]));
    assert_eq!(
        refused("b", &[nothing]),
        format!("model.spz.part: tensor `b`: `b` has sha256 {}, but {nothing} was recorded", b[0])
    );
    assert_eq!(
        refused("b", &[]),
        "model.spz.part: tensor `b`: has 1 components, but 0 digests were recorded"
    );
    assert_eq!(
        refused("c", &digests(&tensors[2])),
        "model.spz.part: tensor `c`: is not in what the interrupted run left, or is not whole there"
    );
    assert_eq!(
        refused("empty", &b),
        format!(
            "model.spz.part: tensor `empty`: `empty` has sha256 {nothing}, but {} was recorded",
            b[0]
        )
    );
    // `b` without `a` before it cannot be kept.
    writer.adopt("b", &b).unwrap();
    let error = writer.write("c", 0, &[0]).unwrap_err();
    assert_eq!(
        message(dir.path(), &error),
        "model.spz.part: tensor `b`: cannot be adopted: `a`, which stands before it, was not"
    );

    let mut other = layout(&tensors);
    other.tensors[1].2 = vec![16];
    let error = resume(dir.path(), other).adopt("b", &b).unwrap_err();
    assert_eq!(
        message(dir.path(), &error),
        "model.spz.part: tensor `b`: is F32 [4, 4] there; expected F32 [16]"
    );
    let mut writer = resume(dir.path(), layout(&tensors));
    put(writer.as_mut(), &tensors[0]);
    let error = writer.adopt("b", &b).unwrap_err();
    assert_eq!(
        message(dir.path(), &error),
        "model.spz.part: tensor `b`: cannot be adopted: this run has begun to write"
    );
}

#[test]
fn a_damaged_part_names_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    interrupted(dir.path(), 2);
    let mut bytes = std::fs::read(part(dir.path())).unwrap();
    bytes[CHUNK_BYTES / 2] ^= 1;
    std::fs::write(part(dir.path()), &bytes).unwrap();
    let tensors = tensors();
    let mut writer = resume(dir.path(), layout(&tensors));
    let error = message(dir.path(), &writer.adopt("a", &digests(&tensors[0])).unwrap_err());
    assert!(error.starts_with("model.spz.part: tensor `a`: the frame at offset "), "{error}");

    bytes[9] = b'?';
    std::fs::write(part(dir.path()), &bytes).unwrap();
    let error =
        ContainerWriter::resume(dir.path(), layout(&tensors), 1, Box::new(InPlace)).unwrap_err();
    assert_eq!(
        message(dir.path(), &error),
        "model.spz.part: offset 0: expected the magic bytes of a sparsepack container"
    );
}

#[test]
fn abandoning_removes_the_part() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), layout(&tensors())).abandon().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
