//! Windows of token ids from a text file: the same file, tokenizer and settings always give the
//! same windows.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rand::RngCore;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sparsepack_formats::Digest;

use crate::model::{ModelConfig, ModelError, Tokenizer};

/// Why a calibration set cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("{path}: cannot read the text")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not text.
    #[error("{path}: not UTF-8 at byte {offset}; expected a text file or a .jsonl file")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// First byte that is not text.
        offset: usize,
    },
    /// A line of a `.jsonl` file is not JSON.
    #[error("{path}: line {line}: invalid JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A line of a `.jsonl` file holds no text.
    #[error("{path}: line {line}: no string under the key `text`")]
    NoText {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// Fewer tokens than the windows need.
    #[error(
        "{path}: {samples} windows of {seq_len} tokens need {needed} tokens, but the text has {found}"
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Windows asked for.
        samples: usize,
        /// Tokens of a window.
        seq_len: usize,
        /// Tokens asked for.
        needed: usize,
        /// Tokens of the text.
        found: usize,
    },
    /// Nothing was asked for.
    #[error("{samples} windows of {seq_len} tokens hold nothing to calibrate on")]
    NoTokens {
        /// Windows asked for.
        samples: usize,
        /// Tokens of a window.
        seq_len: usize,
    },
    /// The text cannot be tokenized, or the model cannot take such windows.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// How windows are taken from a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Windows.
    pub samples: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Seed of random window starts; windows in order from the start of the text when `None`.
    pub seed: Option<u64>,
}

/// Windows of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibrationSet {
    /// The windows, all of one length.
    pub ids: Vec<Vec<u32>>,
    /// SHA-256 of the ids as little-endian u32, window after window.
    pub digest: Digest,
    /// Tokens of the whole text.
    pub text_tokens: usize,
}

impl CalibrationSet {
    /// Tokenizes a text file as one string and takes windows from it.
    ///
    /// # Errors
    /// [`DatasetError`]: a file that is not text, or too short; windows longer than the model's
    /// positions.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        config: &ModelConfig,
        sampling: Sampling,
    ) -> Result<Self, DatasetError> {
        config.check_sequence(sampling.seq_len)?;
        let ids = tokenizer.encode(&read_text(path)?)?;
        Self::from_ids(path, &ids, sampling)
    }

    /// Takes windows from the token ids of the text in `path`.
    ///
    /// # Errors
    /// [`DatasetError::TooShort`], [`DatasetError::NoTokens`].
    pub fn from_ids(path: &Path, ids: &[u32], sampling: Sampling) -> Result<Self, DatasetError> {
        let Sampling { samples, seq_len, seed } = sampling;
        let needed = samples.saturating_mul(seq_len);
        if needed == 0 {
            return Err(DatasetError::NoTokens { samples, seq_len });
        }
        if needed > ids.len() {
            let (path, found) = (path.to_owned(), ids.len());
            return Err(DatasetError::TooShort { path, samples, seq_len, needed, found });
        }
        let starts: Vec<usize> = match seed {
            None => (0..samples).map(|window| window * seq_len).collect(),
            Some(seed) => random_starts(ids.len(), sampling, seed),
        };
        let windows: Vec<Vec<u32>> =
            starts.into_iter().map(|start| ids[start..start + seq_len].to_vec()).collect();
        let bytes: Vec<u8> = windows.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
        Ok(Self { ids: windows, digest: Digest::of(&bytes), text_tokens: ids.len() })
    }
}

/// Starts of windows that do not overlap, in text order, every such choice equally likely.
///
/// `samples` distinct numbers below `tokens − samples·seq_len + samples` are drawn from `ChaCha8`
/// seeded with `seed` (the high half of `next_u64 · limit`, repeats drawn again); the i-th smallest
/// `v` is a window at `v − i + i·seq_len`.
fn random_starts(tokens: usize, sampling: Sampling, seed: u64) -> Vec<usize> {
    let Sampling { samples, seq_len, .. } = sampling;
    let limit = (tokens - samples * seq_len + samples) as u128;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut drawn = BTreeSet::new();
    while drawn.len() < samples {
        drawn.insert(((u128::from(rng.next_u64()) * limit) >> 64) as usize);
    }
    drawn.into_iter().enumerate().map(|(i, v)| v - i + i * seq_len).collect()
}

/// Reads a text: a `.jsonl` file's documents (the string under `text` in every line that is not
/// blank) joined by an empty line, any other file as it is.
///
/// # Errors
/// [`DatasetError`] naming the file, and the line or byte.
pub fn read_text(path: &Path) -> Result<String, DatasetError> {
    let bytes =
        std::fs::read(path).map_err(|source| DatasetError::Io { path: path.to_owned(), source })?;
    let text = String::from_utf8(bytes).map_err(|error| DatasetError::NotUtf8 {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to(),
    })?;
    if path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(text);
    }
    let documents = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let documents: Vec<String> = documents
        .map(|(line, number)| document(path, line, number))
        .collect::<Result<_, DatasetError>>()?;
    Ok(documents.join("\n\n"))
}

fn document(path: &Path, line: &str, number: usize) -> Result<String, DatasetError> {
    let value: serde_json::Value = serde_json::from_str(line)
        .map_err(|source| DatasetError::Json { path: path.to_owned(), line: number, source })?;
    let text = value.get("text").and_then(serde_json::Value::as_str);
    text.map(str::to_owned)
        .ok_or_else(|| DatasetError::NoText { path: path.to_owned(), line: number })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelSource;

    fn take(tokens: u32, samples: usize, seq_len: usize, seed: Option<u64>) -> CalibrationSet {
        let ids: Vec<u32> = (0..tokens).collect();
        let sampling = Sampling { samples, seq_len, seed };
        CalibrationSet::from_ids(Path::new("t.txt"), &ids, sampling).unwrap()
    }

    #[test]
    fn windows_follow_each_other_from_the_start() {
        let set = take(10, 3, 3, None);
        assert_eq!(set.ids, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]);
        assert_eq!(set.text_tokens, 10);
        let bytes: Vec<u8> = (0..9u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(set.digest, Digest::of(&bytes));
    }

    #[test]
    fn random_windows_repeat_by_seed_and_do_not_overlap() {
        let set = take(1000, 20, 40, Some(7));
        assert_eq!(set, take(1000, 20, 40, Some(7)));
        assert_ne!(set.ids, take(1000, 20, 40, Some(8)).ids);
        assert_ne!(set.ids, take(1000, 20, 40, None).ids);
        let starts: Vec<u32> = set.ids.iter().map(|window| window[0]).collect();
        assert!(starts.windows(2).all(|pair| pair[1] >= pair[0] + 40));
        assert!(set.ids.iter().flatten().all(|id| *id < 1000));
        // Where only one choice fits, every seed takes it.
        assert_eq!(take(100, 10, 10, Some(3)).ids, take(100, 10, 10, None).ids);
    }

    #[test]
    fn random_windows_are_the_same_for_all_time() {
        let starts: Vec<u32> = take(1000, 5, 100, Some(1)).ids.iter().map(|w| w[0]).collect();
        assert_eq!(starts, [40, 209, 341, 500, 697]);
    }

    #[test]
    fn short_texts_and_empty_requests_are_refused() {
        let error = |samples, seq_len| {
            let sampling = Sampling { samples, seq_len, seed: None };
            let result = CalibrationSet::from_ids(Path::new("t.txt"), &[1; 10], sampling);
            result.unwrap_err().to_string()
        };
        assert_eq!(error(4, 3), "t.txt: 4 windows of 3 tokens need 12 tokens, but the text has 10");
        assert_eq!(error(0, 3), "0 windows of 3 tokens hold nothing to calibrate on");
    }

    #[test]
    fn json_lines_are_documents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.jsonl");
        let read = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            read_text(&path)
                .map_err(|error| error.to_string().replace(&path.display().to_string(), "FILE"))
        };
        let lines = "{\"text\": \"one\\ntwo\"}\n\n{\"id\": 1, \"text\": \"three\"}\n";
        assert_eq!(read(lines.as_bytes()).unwrap(), "one\ntwo\n\nthree");
        assert_eq!(
            read(b"{\"text\": \"a\"}\n{\"txt\": 1}\n").unwrap_err(),
            "FILE: line 2: no string under the key `text`"
        );
        assert_eq!(read(b"\n{oops\n").unwrap_err(), "FILE: line 2: invalid JSON");
        assert_eq!(
            read(b"ab\xff").unwrap_err(),
            "FILE: not UTF-8 at byte 2; expected a text file or a .jsonl file"
        );
    }

    #[test]
    fn windows_longer_than_the_model_are_refused() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let source = ModelSource::open(&fixtures.join("model")).unwrap();
        let tokenizer = Tokenizer::open(&source).unwrap();
        let text = fixtures.join("text/heldout.txt");
        let load = |samples, seq_len| {
            let sampling = Sampling { samples, seq_len, seed: None };
            CalibrationSet::load(&text, &tokenizer, source.config(), sampling)
        };
        assert_eq!(load(4, 512).unwrap().ids.len(), 4);
        assert!(matches!(
            load(1, 513),
            Err(DatasetError::Model(ModelError::SequenceTooLong { .. }))
        ));
        assert!(matches!(load(100_000, 512), Err(DatasetError::TooShort { .. })));
    }
}
