//! Splits: what the writer makes, and what is wrong with one that is not whole.

use std::path::{Path, PathBuf};

use sparsepack_formats::gguf::{GgufMetadata, GgufReader, GgufValue};
use sparsepack_formats::{
    CheckpointReader, DType, Encoding, FormatError, GgufLayout, GgufWriter, ModelMetadata, open,
};

const F32: Encoding = Encoding::Dense { dtype: DType::F32 };

/// Writes three files with five tensors.
fn split(dir: &Path, name: &str) {
    let mut metadata = GgufMetadata::new(dir);
    metadata.set("general.architecture", GgufValue::String("llama".to_owned()));
    metadata.set("split.count", GgufValue::U16(99));
    metadata.set("general.name", GgufValue::String(name.to_owned()));
    let tensor = |name: &str| (name.to_owned(), F32, vec![3]);
    let files =
        vec![vec![tensor("a"), tensor("b")], vec![tensor("c")], vec![tensor("d"), tensor("e")]];
    let layout = GgufLayout { metadata, files };
    let mut writer = GgufWriter::create(dir, &layout).unwrap();
    for name in ["a", "b", "c", "d", "e"] {
        writer.write(name, 0, name.repeat(12).as_bytes()).unwrap();
    }
    writer.finish().unwrap();
}

fn file(dir: &Path, no: usize) -> PathBuf {
    dir.join(format!("model-{no:05}-of-00003.gguf"))
}

#[test]
fn the_keys_are_those_of_llama_cpp() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    let reader = open(&file(dir.path(), 1)).unwrap();
    let ModelMetadata::Gguf(metadata) = reader.metadata() else { panic!("not GGUF metadata") };
    let pairs: Vec<_> = metadata.iter().skip(2).collect();
    assert_eq!(
        pairs,
        [
            ("split.no", &GgufValue::U16(0)),
            ("split.count", &GgufValue::U16(3)),
            ("split.tensors.count", &GgufValue::I32(5)),
        ]
    );
    // A later file has these keys alone: 8 + 8 (counts) after the magic and the version.
    let bytes = std::fs::read(file(dir.path(), 2)).unwrap();
    assert_eq!(bytes[16..24], 3u64.to_le_bytes());
}

#[test]
fn the_first_file_and_the_directory_open_all() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    for path in [file(dir.path(), 1), dir.path().to_owned()] {
        let reader = open(&path).unwrap();
        let names: Vec<_> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d", "e"]);
        assert_eq!(reader.files().len(), 3);
        for name in names {
            assert_eq!(reader.components(name).unwrap(), [name.repeat(12).as_bytes()]);
        }
        reader.prefetch(&["a", "e", "no such tensor"]);
        reader.release(&["a", "e"]);
    }
}

/// The message of `path`, which does not open.
fn refused(dir: &Path, path: &Path) -> String {
    let error = open(path).unwrap_err();
    assert!(matches!(error, FormatError::BadSplit { .. }), "{error:?}");
    error.to_string().replace(&format!("{}/", dir.display()), "")
}

#[test]
fn a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    std::fs::remove_file(file(dir.path(), 2)).unwrap();
    let message = "model-00002-of-00003.gguf: not found; model-00001-of-00003.gguf is a file of \
                   the same split";
    assert_eq!(refused(dir.path(), &file(dir.path(), 1)), message);
    assert_eq!(refused(dir.path(), dir.path()), message);
}

#[test]
fn a_later_file_names_the_first() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    let message = "model-00002-of-00003.gguf: is file 2 of 3 of a split; open the first, \
                   model-00001-of-00003.gguf, or the directory";
    assert_eq!(refused(dir.path(), &file(dir.path(), 2)), message);
    std::fs::remove_file(file(dir.path(), 1)).unwrap();
    assert_eq!(refused(dir.path(), dir.path()), message);
}

#[test]
fn a_foreign_file_is_told() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    std::fs::copy(file(dir.path(), 3), file(dir.path(), 2)).unwrap();
    assert_eq!(
        refused(dir.path(), &file(dir.path(), 1)),
        "model-00002-of-00003.gguf: expected file 2 of 3 of a split with 5 tensors, \
         found file 3 of 3 of a split with 5 tensors"
    );
    let whole = dir.path().join("whole");
    std::fs::create_dir(&whole).unwrap();
    let mut metadata = GgufMetadata::new(&whole);
    metadata.set("general.architecture", GgufValue::String("llama".to_owned()));
    let layout = GgufLayout { metadata, files: vec![vec![]] };
    GgufWriter::create(&whole, &layout).unwrap().finish().unwrap();
    std::fs::copy(whole.join("model.gguf"), file(dir.path(), 2)).unwrap();
    assert_eq!(
        refused(dir.path(), &file(dir.path(), 1)),
        "model-00002-of-00003.gguf: expected file 2 of 3 of a split with 5 tensors, \
         found a file by itself"
    );
}

#[test]
fn a_renamed_file_of_a_split_is_told() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    let other = dir.path().join("other.gguf");
    std::fs::copy(file(dir.path(), 1), &other).unwrap();
    assert_eq!(
        refused(dir.path(), &other),
        "other.gguf: file 1 of 3 of a split should be called PREFIX-00001-of-00003.gguf"
    );
}

/// The first file, with the value of `split.*` key `key` replaced.
fn edited(dir: &Path, key: &str, value: &[u8]) {
    let mut bytes = std::fs::read(file(dir, 1)).unwrap();
    let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
    let start = at + key.len() + 4;
    bytes[start..start + value.len()].copy_from_slice(value);
    std::fs::write(file(dir, 1), bytes).unwrap();
}

#[test]
fn counts_that_contradict_each_other_are_told() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    edited(dir.path(), "split.no", &7u16.to_le_bytes());
    assert_eq!(
        refused(dir.path(), &file(dir.path(), 1)),
        "model-00001-of-00003.gguf: `split.no` is 7 and `split.count` is 3 (expected less, and at \
         most 65535)"
    );
    edited(dir.path(), "split.no", &0u16.to_le_bytes());
    edited(dir.path(), "split.tensors.count", &6i32.to_le_bytes());
    assert_eq!(
        refused(dir.path(), &file(dir.path(), 1)),
        "model-00002-of-00003.gguf: expected file 2 of 3 of a split with 6 tensors, \
         found file 2 of 3 of a split with 5 tensors"
    );
    edited(dir.path(), "split.tensors.count", &(-1i32).to_le_bytes());
    let error = open(&file(dir.path(), 1)).unwrap_err().to_string();
    assert!(error.ends_with("expected non-negative integer, found i32 -1"), "{error}");
}

#[test]
fn a_split_with_too_few_tensors_is_told() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    // Every file says six.
    for no in 1..=3 {
        std::fs::rename(file(dir.path(), no), file(dir.path(), 1).with_extension("tmp")).unwrap();
        let mut bytes = std::fs::read(file(dir.path(), 1).with_extension("tmp")).unwrap();
        let key = b"split.tensors.count";
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        bytes[at] = 6;
        std::fs::write(file(dir.path(), no), bytes).unwrap();
    }
    std::fs::remove_file(file(dir.path(), 1).with_extension("tmp")).unwrap();
    assert_eq!(
        refused(dir.path(), &file(dir.path(), 1)),
        "model-00001-of-00003.gguf: the files of the split hold 5 tensors, but \
         `split.tensors.count` is 6"
    );
}

#[test]
fn a_tensor_in_two_files_is_told() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    let mut bytes = std::fs::read(file(dir.path(), 2)).unwrap();
    let at = bytes.windows(9).position(|window| window == b"\x01\0\0\0\0\0\0\0c").unwrap();
    bytes[at + 8] = b'a';
    std::fs::write(file(dir.path(), 2), bytes).unwrap();
    let error = open(&file(dir.path(), 1)).unwrap_err();
    assert!(matches!(error, FormatError::DuplicateTensor { .. }), "{error}");
    assert!(error.to_string().ends_with("model-00002-of-00003.gguf: tensor `a` appears twice"));
}

#[test]
fn a_directory_with_several_models_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    split(dir.path(), "x");
    std::fs::copy(file(dir.path(), 1), dir.path().join("b.gguf")).unwrap();
    let error = open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("a directory with several GGUF files, b.gguf and model-00001-of-00003.gguf"),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    let error = open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("a directory without config.json"), "{error}");
}

#[test]
fn one_file_of_one_is_a_file_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any name.gguf");
    let file = crate::builder::Gguf::new()
        .pair("split.no", 2, &0u16.to_le_bytes())
        .pair("split.count", 2, &1u16.to_le_bytes())
        .pair("split.tensors.count", 5, &0i32.to_le_bytes());
    std::fs::write(&path, file.bytes()).unwrap();
    assert!(GgufReader::open(&path).unwrap().tensors().is_empty());
}
