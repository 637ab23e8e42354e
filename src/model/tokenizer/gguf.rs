//! A byte-level BPE tokenizer from the keys of a GGUF file, and the files that transformers needs
//! for it.

use std::path::Path;

use serde_json::{Map, Value, json};
use sparsepack_formats::gguf::{GgufMetadata, GgufValue};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{ModelError, ModelSource, Result, Sidecar, SidecarContent, defect};

/// `tokenizer.ggml.token_type`: a token that only special handling produces.
const CONTROL: i32 = 3;
/// `tokenizer.ggml.token_type`: a token that is found in any text before the merges apply.
const USER_DEFINED: i32 = 4;

/// GPT-2's split into words, which is byte-level BPE's own.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's split: numbers in groups of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's split: single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp does when a file names no split.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// How text is split into words before the merges apply, by `tokenizer.ggml.pre`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pre {
    /// GPT-2's words.
    Gpt2,
    /// Digits by themselves, then GPT-2's words.
    Digits,
    /// Llama 3's words; a word that is a token is not merged from its parts.
    Llama3,
    /// Qwen2's words.
    Qwen2,
    /// llama.cpp's default.
    Default,
}

/// llama.cpp's names.
const PRES: [(&str, Pre); 16] = [
    ("smollm", Pre::Digits),
    ("starcoder", Pre::Digits),
    ("refact", Pre::Digits),
    ("command-r", Pre::Digits),
    ("codeshell", Pre::Digits),
    ("gpt-2", Pre::Gpt2),
    ("phi-2", Pre::Gpt2),
    ("olmo", Pre::Gpt2),
    ("mpt", Pre::Gpt2),
    ("llama-bpe", Pre::Llama3),
    ("llama3", Pre::Llama3),
    ("llama-v3", Pre::Llama3),
    ("falcon3", Pre::Llama3),
    ("qwen2", Pre::Qwen2),
    ("deepseek-r1-qwen", Pre::Qwen2),
    ("default", Pre::Default),
];

impl Pre {
    fn of(metadata: &GgufMetadata) -> Result<Self> {
        let key = "tokenizer.ggml.pre";
        if metadata.get(key).is_none() {
            tracing::warn!(key, "missing: using llama.cpp's default split into words");
            return Ok(Self::Default);
        }
        let found = metadata.str(key)?;
        let known = PRES.iter().find(|(name, _)| *name == found).map(|(_, pre)| *pre);
        known.ok_or_else(|| unsupported(key, found, PRES.map(|(name, _)| name).join(", ")))
    }

    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let split = |pattern: &str| {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::Split)
        };
        let bytes =
            |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, use_regex));
        let steps = match self {
            Self::Gpt2 => return Ok(bytes(true)),
            Self::Digits => vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)],
            Self::Llama3 => vec![split(LLAMA3)?, bytes(false)],
            Self::Qwen2 => vec![split(QWEN2)?, bytes(false)],
            Self::Default => {
                let mut steps: Vec<_> =
                    DEFAULT.into_iter().map(split).collect::<tokenizers::Result<_>>()?;
                steps.push(bytes(false));
                steps
            }
        };
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}

/// Builds the tokenizer of a GGUF file.
///
/// # Errors
/// A kind of tokenizer that is not supported, by name; missing keys; merges that name unknown
/// tokens.
pub(super) fn build(path: &Path, metadata: &GgufMetadata) -> Result<tokenizers::Tokenizer> {
    let model = metadata.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(unsupported("tokenizer.ggml.model", model, "gpt2".to_owned()));
    }
    let pre = Pre::of(metadata)?;
    let tokens = metadata.strings("tokenizer.ggml.tokens")?;
    let types = metadata.i32s("tokenizer.ggml.token_type")?;
    let merges =
        metadata.strings("tokenizer.ggml.merges")?.iter().map(|merge| split_merge(path, merge));
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.to_owned(), id)).collect();
    let failed = |error: tokenizers::Error| defect(path, &error);
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges.collect::<Result<Vec<_>>>()?)
        .ignore_merges(pre == Pre::Llama3)
        .build()
        .map_err(failed)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer().map_err(failed)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let added = |kind: i32| {
        let special = kind == CONTROL;
        tokens
            .iter()
            .zip(types)
            .filter(move |(_, found)| **found == kind)
            .map(move |(token, _)| AddedToken::from(token, special).normalized(false))
            .collect::<Vec<_>>()
    };
    tokenizer.add_special_tokens(added(CONTROL)).map_err(failed)?;
    tokenizer.add_tokens(added(USER_DEFINED)).map_err(failed)?;
    match special(metadata, "bos").filter(|_| adds_bos(metadata, pre)) {
        Some((id, bos)) => {
            let template = TemplateProcessing::builder()
                .try_single(format!("{bos} $A"))
                .and_then(|builder| builder.try_pair(format!("{bos} $A {bos}:1 $B:1")))
                .map_err(|reason| ModelError::Tokenizer { path: path.to_owned(), reason })?
                .special_tokens(vec![(bos.to_owned(), id)])
                .build()
                .map_err(|reason| ModelError::Tokenizer {
                    path: path.to_owned(),
                    reason: reason.to_string(),
                })?;
            tokenizer.with_post_processor(Some(template));
        }
        None => {
            tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
        }
    }
    Ok(tokenizer)
}

/// The tokenizer and generation settings as files that transformers reads.
pub(super) fn sidecars(source: &ModelSource, metadata: &GgufMetadata) -> Result<Vec<Sidecar>> {
    let tokenizer = build(source.path(), metadata)?;
    let text = tokenizer.to_string(true).map_err(|error| defect(source.path(), &error))?;
    let mut config = Map::new();
    let mut generation = Map::new();
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")] {
        let Some((id, token)) = special(metadata, key) else { continue };
        config.insert(format!("{name}_token"), json!(token));
        if name != "unk" {
            generation.insert(format!("{name}_token_id"), json!(id));
        }
    }
    config.insert("add_bos_token".to_owned(), json!(adds_bos(metadata, Pre::of(metadata)?)));
    config.insert("add_prefix_space".to_owned(), json!(false));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    let positions = source.config().max_position_embeddings;
    config.insert("model_max_length".to_owned(), json!(positions));
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    let template = metadata.get("tokenizer.chat_template").and_then(GgufValue::as_str);
    if let Some(template) = template {
        config.insert("chat_template".to_owned(), json!(template));
    }
    Ok(vec![
        bytes("tokenizer.json", text.into_bytes()),
        bytes("tokenizer_config.json", pretty(config)),
        bytes("generation_config.json", pretty(generation)),
    ])
}

/// Id and text of the token that `tokenizer.ggml.{name}_token_id` names.
fn special<'a>(metadata: &'a GgufMetadata, name: &str) -> Option<(u32, &'a str)> {
    let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?.as_u64()?;
    let tokens = metadata.strings("tokenizer.ggml.tokens").ok()?;
    Some((id.try_into().ok()?, tokens.get(id.try_into().ok()?)?))
}

/// Whether prompts start with the first token; llama.cpp's default depends on the split.
fn adds_bos(metadata: &GgufMetadata, pre: Pre) -> bool {
    let key = metadata.get("tokenizer.ggml.add_bos_token").and_then(GgufValue::as_bool);
    key.unwrap_or(pre == Pre::Llama3)
}

/// The two parts of a merge. A part may start with a space, not hold one further on.
fn split_merge(path: &Path, merge: &str) -> Result<(String, String)> {
    let space = merge.char_indices().skip(1).find(|(_, c)| *c == ' ');
    let (left, right) = space.map(|(at, _)| (&merge[..at], &merge[at + 1..])).ok_or_else(|| {
        ModelError::Tokenizer {
            path: path.to_owned(),
            reason: format!("merge `{merge}` has one part (expected two)"),
        }
    })?;
    Ok((left.to_owned(), right.to_owned()))
}

fn unsupported(key: &str, found: &str, supported: String) -> ModelError {
    ModelError::UnsupportedValue { key: key.to_owned(), found: found.to_owned(), supported }
}

fn bytes(name: &str, content: Vec<u8>) -> Sidecar {
    Sidecar { name: name.to_owned(), content: SidecarContent::Bytes(content) }
}

fn pretty(object: Map<String, Value>) -> Vec<u8> {
    let mut text = format!("{:#}", Value::Object(object));
    text.push('\n');
    text.into_bytes()
}
