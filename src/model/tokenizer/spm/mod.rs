//! SentencePiece BPE with byte fallback: the vocabularies of Llama 2, Mistral and TinyLlama, in GGUF
//! `tokenizer.ggml.model` = `llama`.
//!
//! llama.cpp starts from the characters of a text and merges, as long as it can, the two neighbours
//! that together are the token of the highest score, the leftmost of equals. Characters that are left
//! without a token become the tokens of their bytes. A `tokenizer.json` ranks pairs of tokens instead.
//! Both do the same if every way to make a token is a merge, the merges of a token follow each other,
//! and no two tokens share a score; [`Pieces`] are refused, by name, where that does not hold. Runs of
//! one character, such as Llama 2's of spaces, may share a score: growing the longest run first is
//! growing the leftmost.
//!
//! One case is left: of two overlapping ways to make one token (`ab` `a` `ba` for `aba`) llama.cpp takes
//! the leftmost, and merges the one that ranks higher.

mod build;
mod directory;
mod json;
mod proto;

use std::collections::{HashMap, hash_map::Entry};
use std::path::Path;

use sparsepack_formats::gguf::{GgufArray, GgufMetadata, GgufStrings, GgufValue};

use super::super::error::{ModelError, Result};
use super::{CONTROL, NORMAL, UNUSED, USER_DEFINED};

pub(super) use directory::{MODEL_FILE, of_directory};
pub(super) use json::is_sentencepiece;

/// `tokenizer.ggml.model` of these vocabularies.
pub(super) const MODEL: &str = "llama";
/// `tokenizer.ggml.token_type`: the token of text that has none.
const UNKNOWN: i32 = 2;
/// `tokenizer.ggml.token_type`: a byte, spelled `<0x0A>`.
const BYTE: i32 = 6;
/// What stands for a space.
const SPACE: char = '\u{2581}';
/// Score of added tokens, as llama.cpp's converter has it; no text is merged into them.
const ADDED_SCORE: f32 = -1000.0;
/// Score of ids without a token, as llama.cpp's converter has it.
const UNUSED_SCORE: f32 = -10_000.0;
/// Ids of a vocabulary; Gemma's has 262,144.
const MAX_TOKENS: usize = 1 << 20;
/// Bytes of a token that can be merged; tokens of known models have less than 200.
const MAX_TOKEN_BYTES: usize = 1024;

/// A vocabulary: token, score and type by id.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pieces {
    pub(super) tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
    /// Whether a text gets a space before it.
    pub(super) space_prefix: bool,
    /// The ids of unknown, first, last and padding token in a `tokenizer.model`.
    pub(super) ids: [Option<u32>; 4],
}

/// Names of [`Pieces::ids`] in GGUF keys.
pub(super) const ID_NAMES: [&str; 4] = ["unknown", "bos", "eos", "padding"];

impl Pieces {
    /// The vocabulary of a GGUF file.
    ///
    /// # Errors
    /// Keys that are missing or of different lengths.
    pub(super) fn of_gguf(metadata: &GgufMetadata) -> Result<Self> {
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let scores = metadata.f32s("tokenizer.ggml.scores")?;
        let types = metadata.i32s("tokenizer.ggml.token_type")?;
        for (key, found) in [("scores", scores.len()), ("token_type", types.len())] {
            if found != tokens.len() {
                return Err(ModelError::InvalidValue {
                    key: format!("tokenizer.ggml.{key}"),
                    found: format!("{found} values"),
                    expected: format!("{}, one for each token", tokens.len()),
                });
            }
        }
        let prefix = metadata.get("tokenizer.ggml.add_space_prefix").and_then(GgufValue::as_bool);
        Ok(Self {
            tokens: tokens.iter().map(str::to_owned).collect(),
            scores: scores.to_vec(),
            types: types.to_vec(),
            space_prefix: prefix.unwrap_or(true),
            ids: [Some(0), Some(1), Some(2), None],
        })
    }

    /// Refuses what llama.cpp cannot load or tokenize with: two ids with one text, scores without an
    /// order, a byte without a token.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    fn check(&self, path: &Path) -> Result<()> {
        let ids = self.index(path)?;
        if let Some(id) = self.scores.iter().position(|score| !score.is_finite()) {
            let (token, score) = (&self.tokens[id], self.scores[id]);
            return Err(defect(path, format!("token `{token}` has the score {score}")));
        }
        for byte in 0..=u8::MAX {
            let token = byte_token(byte);
            if !ids.contains_key(token.as_str()) {
                return Err(defect(path, format!("no token `{token}`, so some text has none")));
            }
        }
        Ok(())
    }

    /// Ids by token.
    fn index(&self, path: &Path) -> Result<HashMap<&str, usize>> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            match ids.entry(token.as_str()) {
                Entry::Vacant(entry) => entry.insert(id),
                Entry::Occupied(entry) => {
                    let first = entry.get();
                    return Err(defect(path, format!("`{token}` is both token {first} and {id}")));
                }
            };
        }
        Ok(ids)
    }

    /// Sets the token of an id that the vocabulary has, or that follows it somewhere.
    fn add(&mut self, path: &Path, id: usize, text: &str, special: bool) -> Result<()> {
        if id >= MAX_TOKENS {
            return Err(defect(
                path,
                format!("token `{text}` has the id {id} (expected less than {MAX_TOKENS})"),
            ));
        }
        self.pad(id + 1);
        // Text is searched for these before its spaces are replaced.
        let text = if special { text.to_owned() } else { text.replace(SPACE, " ") };
        let before = &self.tokens[id];
        if self.types[id] != UNUSED && *before != text && before.replace(SPACE, " ") != text {
            return Err(defect(path, format!("id {id} is that of `{before}` and of `{text}`")));
        }
        self.tokens[id] = text;
        self.scores[id] = ADDED_SCORE;
        if self.types[id] != UNKNOWN {
            self.types[id] = if special { CONTROL } else { USER_DEFINED };
        }
        Ok(())
    }

    /// Appends unused ids up to `len`.
    fn pad(&mut self, len: usize) {
        for id in self.tokens.len()..len {
            self.tokens.push(format!("[PAD{id}]"));
            self.scores.push(UNUSED_SCORE);
            self.types.push(UNUSED);
        }
    }

    /// Sets the keys of the vocabulary, with `vocab_size` ids.
    ///
    /// # Errors
    /// Tokens beyond `vocab_size`; what [`check`](Self::check) refuses.
    pub(super) fn put(
        &mut self,
        path: &Path,
        vocab_size: usize,
        metadata: &mut GgufMetadata,
    ) -> Result<()> {
        if let Some(token) = self.tokens.get(vocab_size) {
            return Err(defect(
                path,
                format!("token `{token}` has no id below the model's vocab_size of {vocab_size}"),
            ));
        }
        self.pad(vocab_size);
        self.check(path)?;
        for (key, value) in [("model", MODEL), ("pre", "default")] {
            metadata.set(&format!("tokenizer.ggml.{key}"), GgufValue::String(value.to_owned()));
        }
        let tokens = self.tokens.iter().collect::<GgufStrings>();
        for (key, array) in [
            ("tokens", GgufArray::String(tokens)),
            ("scores", GgufArray::F32(self.scores.clone())),
            ("token_type", GgufArray::I32(self.types.clone())),
        ] {
            metadata.set(&format!("tokenizer.ggml.{key}"), GgufValue::Array(array));
        }
        let prefix = GgufValue::Bool(self.space_prefix);
        metadata.set("tokenizer.ggml.add_space_prefix", prefix);
        Ok(())
    }
}

/// The ways to cut a token in two.
fn splits(token: &str) -> impl Iterator<Item = (&str, &str)> {
    token.char_indices().skip(1).map(|(at, _)| token.split_at(at))
}

/// Whether llama.cpp can come to this text by merging: a token, or a character to start from.
fn is_symbol(text: &str, ids: &HashMap<&str, usize>) -> bool {
    ids.contains_key(text) || text.chars().nth(1).is_none()
}

/// Whether both tokens are runs of one and the same character. Llama 2 has runs of spaces that share a
/// score.
fn runs_of_one(a: &str, b: &str) -> bool {
    let first = a.chars().next();
    a.chars().chain(b.chars()).all(|char| Some(char) == first)
}

/// The spelling of a byte.
fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Refuses a token whose splits would take long to go through.
fn check_length(path: &Path, token: &str) -> Result<()> {
    if token.len() > MAX_TOKEN_BYTES {
        let found = token.len();
        return Err(defect(
            path,
            format!("a token of {found} bytes (expected at most {MAX_TOKEN_BYTES})"),
        ));
    }
    Ok(())
}

fn defect(path: &Path, reason: String) -> ModelError {
    ModelError::Tokenizer { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests;
