//! Split files: one checkpoint in several GGUF files, as `llama-gguf-split` of llama.cpp makes them.
//!
//! The files are `PREFIX-00001-of-0000N.gguf` and on. Each has three keys: `split.no` (u16, from 0),
//! `split.count` (u16) and `split.tensors.count` (i32, of all files together). All other metadata is
//! in the first.

use std::path::{Path, PathBuf};

use super::metadata::{GgufMetadata, GgufValue};
use crate::{FormatError, Result};

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// The keys of a file that are about its place in a split, not about the model.
pub const SPLIT_KEYS: [&str; 3] = [NO, COUNT, TENSORS];

/// A file's place in its split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    /// From 0.
    pub(super) no: u64,
    /// Files.
    pub(super) count: u64,
    /// Tensors of all files.
    pub(super) tensors: u64,
}

impl Split {
    /// What the metadata of a file says, if it is one of several.
    ///
    /// # Errors
    /// Some of the keys without the others, or values that contradict each other.
    pub(super) fn of(path: &Path, metadata: &GgufMetadata) -> Result<Option<Self>> {
        if metadata.get(COUNT).is_none() || metadata.u64(COUNT)? <= 1 {
            return Ok(None);
        }
        let (no, count) = (metadata.u64(NO)?, metadata.u64(COUNT)?);
        let tensors = metadata.u64(TENSORS)?;
        let limit = u64::from(u16::MAX);
        if no >= count || count > limit {
            return Err(FormatError::BadSplit {
                path: path.to_owned(),
                what: format!(
                    "`{NO}` is {no} and `{COUNT}` is {count} (expected less, and at most {limit})"
                ),
            });
        }
        Ok(Some(Self { no, count, tensors }))
    }

    /// Adds the keys.
    ///
    /// # Errors
    /// More files or tensors than the keys can count.
    pub(super) fn set(self, path: &Path, metadata: &mut GgufMetadata) -> Result<()> {
        let too_many = |what: String| FormatError::BadSplit { path: path.to_owned(), what };
        let number = |value: u64| {
            u16::try_from(value)
                .map_err(|_| too_many(format!("{value} files (expected at most {})", u16::MAX)))
        };
        let tensors = i32::try_from(self.tensors)
            .map_err(|_| too_many(format!("{} tensors (expected 31 bits)", self.tensors)))?;
        metadata.set(NO, GgufValue::U16(number(self.no)?));
        metadata.set(COUNT, GgufValue::U16(number(self.count)?));
        metadata.set(TENSORS, GgufValue::I32(tensors));
        Ok(())
    }

    /// The files of the split that `first` begins, `first` included.
    ///
    /// # Errors
    /// `first` is not the first file, or not named as one.
    pub(super) fn files(self, first: &Path) -> Result<Vec<PathBuf>> {
        let bad = |what: String| FormatError::BadSplit { path: first.to_owned(), what };
        let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(prefix) = name.strip_suffix(&suffix(self.no, self.count)) else {
            return Err(bad(format!(
                "file {} of {} of a split should be called PREFIX{}",
                self.no + 1,
                self.count,
                suffix(self.no, self.count)
            )));
        };
        if self.no > 0 {
            return Err(bad(format!(
                "is file {} of {} of a split; open the first, {prefix}{}, or the directory",
                self.no + 1,
                self.count,
                suffix(0, self.count)
            )));
        }
        let file = |no| first.with_file_name(format!("{prefix}{}", suffix(no, self.count)));
        Ok((0..self.count).map(file).collect())
    }
}

fn suffix(no: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", no + 1)
}

/// The name of an output file: `model.gguf`, or that of a split.
pub(super) fn file_name(no: usize, count: usize) -> String {
    match count {
        1 => "model.gguf".to_owned(),
        _ => format!("model{}", suffix(no as u64, count as u64)),
    }
}

/// The one GGUF checkpoint in a directory: its only `.gguf` file, or the first file of its only
/// split. `None` without any such file.
///
/// # Errors
/// The directory cannot be listed, or holds several.
pub(crate) fn find_in(directory: &Path) -> Result<Option<PathBuf>> {
    let io = |source| FormatError::Io {
        path: directory.to_owned(),
        action: "list the directory".into(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|end| end == "gguf")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    let firsts: Vec<&String> = names.iter().filter(|name| !is_later_shard(name)).collect();
    match (firsts.as_slice(), names.first()) {
        ([one], _) => Ok(Some(directory.join(one))),
        // Shards without the first: opening the one there says what is wrong.
        ([], shard) => Ok(shard.map(|name| directory.join(name))),
        ([first, second, ..], _) => Err(FormatError::UnknownFormat {
            path: directory.to_owned(),
            found: format!("a directory with several GGUF files, {first} and {second} among them"),
        }),
    }
}

/// Whether `name` is that of a file of a split other than the first.
fn is_later_shard(name: &str) -> bool {
    let parts = name.strip_suffix(".gguf").and_then(|stem| {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (_, number) = rest.rsplit_once('-')?;
        Some((number, count))
    });
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.is_some_and(|(number, count)| digits(number) && digits(count) && number != "00001")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_after_the_first() {
        let split = Split { no: 0, count: 3, tensors: 9 };
        let files = split.files(Path::new("d/a-b-00001-of-00003.gguf")).unwrap();
        let names = ["d/a-b-00001-of-00003.gguf", "d/a-b-00002-of-00003.gguf"];
        assert_eq!(files[..2], names.map(PathBuf::from));
        assert_eq!(files.len(), 3);
        assert_eq!(
            split.files(Path::new("d/m.gguf")).unwrap_err().to_string(),
            "d/m.gguf: file 1 of 3 of a split should be called PREFIX-00001-of-00003.gguf"
        );
        assert_eq!(
            Split { no: 1, ..split }
                .files(Path::new("m-00002-of-00003.gguf"))
                .unwrap_err()
                .to_string(),
            "m-00002-of-00003.gguf: is file 2 of 3 of a split; open the first, \
             m-00001-of-00003.gguf, or the directory"
        );
    }

    #[test]
    fn later_shards_are_told_by_their_names() {
        assert!(is_later_shard("m-00002-of-00003.gguf"));
        for name in ["m-00001-of-00003.gguf", "m.gguf", "m-2-of-3.gguf", "m-0000x-of-00003.gguf"] {
            assert!(!is_later_shard(name), "{name}");
        }
    }
}
