//! `tokenizer.model`: the protocol buffer `ModelProto` of SentencePiece.
//!
//! | message | field | number | type | default |
//! |---|---|---|---|---|
//! | `ModelProto` | pieces, trainer, normalizer | 1, 2, 3 | messages, the first repeated | |
//! | piece | text, score, type | 1, 2, 3 | string, float, enum | type 1: normal |
//! | trainer | model type | 3 | enum | 1: unigram; 2 is BPE |
//! | trainer | whitespace as suffix | 24 | bool | false |
//! | trainer | ids of unknown, first, last and padding token | 40 to 43 | int32, -1 for none | 0, 1, 2, -1 |
//! | normalizer | name, character map | 1, 2 | string, bytes | |
//! | normalizer | space before the text, fewer spaces, spaces as U+2581 | 3, 4, 5 | bool | true |
//!
//! Types of pieces have the numbers that GGUF gives them. Source: `src/sentencepiece_model.proto` of
//! SentencePiece.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use prost::Message;

use super::super::super::error::{ModelError, Result};
use super::{Pieces, SPACE, USER_DEFINED, check_length, defect};

/// Most bytes of a file; Gemma's, of 256,000 pieces, has 4.2 MB.
const MAX_BYTES: u64 = 16 << 20;
/// The model type of BPE.
const BPE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub(super) pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub(super) trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    pub(super) normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Piece {
    #[prost(string, optional, tag = "1")]
    pub(super) text: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub(super) score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    pub(super) kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Trainer {
    #[prost(int32, optional, tag = "3", default = "1")]
    pub(super) model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub(super) whitespace_suffix: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    pub(super) unknown: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    pub(super) first: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    pub(super) last: Option<i32>,
    #[prost(int32, optional, tag = "43", default = "-1")]
    pub(super) padding: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Normalizer {
    #[prost(string, optional, tag = "1")]
    pub(super) name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub(super) character_map: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    pub(super) space_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    pub(super) fewer_spaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    pub(super) escapes_spaces: Option<bool>,
}

/// Reads a `tokenizer.model`, if there is one.
///
/// # Errors
/// A file that cannot be read, is too large, or is no such message.
pub(super) fn read(path: &Path) -> Result<Option<ModelProto>> {
    let failed = |source| ModelError::Io { path: path.to_owned(), action: "read", source };
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        let reason = format!("more than {MAX_BYTES} bytes, which is no SentencePiece model");
        return Err(defect(path, reason));
    }
    let proto = ModelProto::decode(bytes.as_slice())
        .map_err(|error| defect(path, format!("no SentencePiece model: {error}")))?;
    if proto.pieces.is_empty() {
        return Err(defect(path, "no SentencePiece model: no pieces".to_owned()));
    }
    Ok(Some(proto))
}

impl ModelProto {
    /// The vocabulary.
    ///
    /// # Errors
    /// A model that is not BPE; a piece without text; an unknown type of piece.
    pub(super) fn pieces(self, path: &Path) -> Result<Pieces> {
        let trainer = self.trainer.unwrap_or_default();
        let model_type = trainer.model_type();
        if model_type != BPE {
            let name = ["unigram", "BPE", "word", "char"];
            let index = usize::try_from(model_type).ok().and_then(|index| index.checked_sub(1));
            let name = index.and_then(|index| name.get(index)).copied().unwrap_or("unknown");
            let reason = format!("a SentencePiece model of type {name} (expected BPE)");
            return Err(defect(path, reason));
        }
        let space_prefix = self.normalizer.as_ref().is_none_or(Normalizer::space_prefix);
        let id = |id: i32| u32::try_from(id).ok();
        let mut pieces = Pieces {
            tokens: Vec::with_capacity(self.pieces.len()),
            scores: Vec::with_capacity(self.pieces.len()),
            types: Vec::with_capacity(self.pieces.len()),
            space_prefix,
            ids: [trainer.unknown(), trainer.first(), trainer.last(), trainer.padding()].map(id),
        };
        for (id, piece) in self.pieces.into_iter().enumerate() {
            let (score, kind) = (piece.score(), piece.kind());
            let text = piece.text.filter(|text| !text.is_empty());
            let text = text.ok_or_else(|| defect(path, format!("piece {id} has no text")))?;
            check_length(path, &text)?;
            if !(1..=6).contains(&kind) {
                let reason = format!("piece {id}, `{text}`, is of type {kind} (expected 1 to 6)");
                return Err(defect(path, reason));
            }
            // Text is searched for these before its spaces are replaced.
            let text = if kind == USER_DEFINED { text.replace(SPACE, " ") } else { text };
            pieces.tokens.push(text);
            pieces.scores.push(score);
            pieces.types.push(kind);
        }
        Ok(pieces)
    }

    /// Refuses changes of the text that llama.cpp does not make.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] naming the change.
    pub(super) fn check_normalizer(&self, path: &Path) -> Result<()> {
        let normalizer = self.normalizer.clone().unwrap_or_default();
        let maps = normalizer.character_map.as_ref().is_some_and(|map| !map.is_empty());
        let suffix = self.trainer.as_ref().is_some_and(Trainer::whitespace_suffix);
        let change = if maps {
            format!("maps characters ({})", normalizer.name())
        } else if normalizer.fewer_spaces() {
            "removes extra spaces".to_owned()
        } else if !normalizer.escapes_spaces() || suffix {
            "does not put U+2581 in the place of spaces, before words".to_owned()
        } else {
            return Ok(());
        };
        Err(defect(path, format!("the normalizer {change}, which llama.cpp does not")))
    }
}
