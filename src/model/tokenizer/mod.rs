//! Text to token ids, without special tokens: the same ids whether the vocabulary comes from a
//! `tokenizer.json`, from SentencePiece's `tokenizer.model` or from a GGUF file.
//!
//! Text that looks like a special token is text. llama.cpp's ids for a GGUF file (with
//! `parse_special` off) are the reference.

mod export;
mod gguf;
mod pre;
mod spm;

use std::path::{Path, PathBuf};

use serde_json::Value;
use sparsepack_formats::ModelMetadata;
use tokenizers::AddedToken;

use super::error::{ModelError, Result};
use super::source::ModelSource;

pub(crate) use export::put_tokenizer;

/// `tokenizer.ggml.token_type`: an ordinary token.
const NORMAL: i32 = 1;
/// `tokenizer.ggml.token_type`: a token that only special handling produces.
const CONTROL: i32 = 3;
/// `tokenizer.ggml.token_type`: a token that is found in any text before the merges apply.
const USER_DEFINED: i32 = 4;
/// `tokenizer.ggml.token_type`: an id that no text has.
const UNUSED: i32 = 5;

/// File names beside a Hugging Face checkpoint that belong to its tokenizer and generation
/// settings; `*` stands for any text.
const SIDECARS: [&str; 10] = [
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
];

/// A file to put beside the weights of a converted checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    /// Its name.
    pub name: String,
    /// What goes in.
    pub content: SidecarContent,
}

/// What goes into a [`Sidecar`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SidecarContent {
    /// A copy of this file.
    Copy(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// The tokenizer of a checkpoint: `tokenizer.json` of its directory, or `tokenizer.model` where
    /// there is no other, or the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`]; a tokenizer that cannot be built, or of a kind that is not
    /// supported, by name.
    pub fn open(source: &ModelSource) -> Result<Self> {
        match source.reader().metadata() {
            ModelMetadata::HuggingFace { directory, .. } => {
                let path = directory.join("tokenizer.json");
                if path.is_file() {
                    return Self::from_file(&path);
                }
                let settings = read_json(&directory.join("tokenizer_config.json"))?;
                let settings = settings.unwrap_or_default();
                let Some(pieces) = spm::of_directory(directory, None, &settings)? else {
                    return Err(ModelError::NoTokenizer { path });
                };
                let path = directory.join(spm::MODEL_FILE);
                Ok(Self::new(&path, pieces.tokenizer(&path)?))
            }
            ModelMetadata::Gguf(metadata) => {
                let inner = gguf::build(source.path(), metadata)?;
                Ok(Self::new(source.path(), inner))
            }
            _ => Err(ModelError::NoTokenizer { path: source.path().join("tokenizer.json") }),
        }
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_file(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(ModelError::NoTokenizer { path: path.to_owned() });
        }
        let inner = tokenizers::Tokenizer::from_file(path).map_err(|error| defect(path, &error))?;
        Ok(Self::new(path, inner))
    }

    fn new(path: &Path, mut inner: tokenizers::Tokenizer) -> Self {
        // Settings for batches of prompts, which a file may carry, must not cut a text.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        inner.set_encode_special_tokens(true);
        Self { path: path.to_owned(), inner }
    }

    /// Token ids of `text`, with no special tokens added or recognized.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the vocabulary lacks what the text needs.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|error| defect(&self.path, &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// The files that make a converted checkpoint usable: those beside a Hugging Face checkpoint,
/// copied, or those that transformers needs for what a GGUF file holds. Sorted by name.
///
/// # Errors
/// A directory that cannot be read; a GGUF tokenizer that is not supported, by name.
pub fn sidecars(source: &ModelSource) -> Result<Vec<Sidecar>> {
    let mut found = match source.reader().metadata() {
        ModelMetadata::HuggingFace { directory, .. } => copies(directory)?,
        ModelMetadata::Gguf(metadata) => gguf::sidecars(source, metadata)?,
        _ => Vec::new(),
    };
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Plain files of `directory` that [`SIDECARS`] names, links to files included: a hub cache is made
/// of them.
fn copies(directory: &Path) -> Result<Vec<Sidecar>> {
    let failed = |source| ModelError::Io {
        path: directory.to_owned(),
        action: "list the directory",
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(std::ffi::OsStr::to_str).unwrap_or_default();
        if path.is_file() && SIDECARS.iter().any(|pattern| matches_pattern(name, pattern)) {
            found.push(Sidecar { name: name.to_owned(), content: SidecarContent::Copy(path) });
        }
    }
    Ok(found)
}

fn matches_pattern(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => name == pattern,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    }
}

/// Makes control tokens special and has user-defined ones found in any text.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    tokens: &[&str],
    types: &[i32],
) -> tokenizers::Result<()> {
    let added = |kind: i32| {
        let tokens = tokens.iter().zip(types).filter(move |(_, found)| **found == kind);
        let special = kind == CONTROL;
        tokens
            .map(|(token, _)| AddedToken::from(*token, special).normalized(false))
            .collect::<Vec<_>>()
    };
    tokenizer.add_special_tokens(added(CONTROL))?;
    tokenizer.add_tokens(added(USER_DEFINED))?;
    Ok(())
}

/// The merges of a `tokenizer.json`, which come as `left right` or as pairs.
fn merge_pairs<'a>(path: &Path, tokenizer: &'a Value) -> Result<Vec<(&'a str, &'a str)>> {
    let wrong = |reason: String| ModelError::Tokenizer { path: path.to_owned(), reason };
    let merges = tokenizer.pointer("/model/merges").and_then(Value::as_array);
    let merges = merges.ok_or_else(|| wrong("no merges".to_owned()))?;
    let pair = |merge: &'a Value| match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
            _ => None,
        },
        _ => None,
    };
    let plain = |(left, right): &(&str, &str)| !left.contains(' ') && !right.contains(' ');
    merges
        .iter()
        .map(|merge| {
            pair(merge)
                .filter(plain)
                .ok_or_else(|| wrong(format!("merge {merge} (expected two parts without spaces)")))
        })
        .collect()
}

/// A file as text, if there is one.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::Io { path: path.to_owned(), action: "read", source }),
    }
}

/// A file as JSON, if there is one.
fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(text) = read(path)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| ModelError::Tokenizer { path: path.to_owned(), reason: error.to_string() })
}

fn defect(path: &Path, error: &tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { path: path.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests;
