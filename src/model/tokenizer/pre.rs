//! How byte-level BPE splits text into words before the merges apply: llama.cpp's names for it, and
//! the `pre_tokenizer` objects of a `tokenizer.json` that do the same.

use serde_json::Value;
use sparsepack_formats::gguf::GgufMetadata;
use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use super::super::error::{ModelError, Result};

/// The key that names the split.
pub(super) const KEY: &str = "tokenizer.ggml.pre";

/// GPT-2's split into words, which is byte-level BPE's own.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's split: numbers in groups of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's split: single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp does when a file names no split.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

/// How text is split into words before the merges apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pre {
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

/// llama.cpp's names; of several, the first is written.
const NAMES: [(&str, Pre); 16] = [
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

/// One step of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Every digit by itself.
    Digits,
    /// Matches of an expression are words by themselves.
    Split(String),
    /// Bytes become the characters of byte-level vocabularies, after GPT-2's split or without.
    Bytes { split: bool },
}

impl Pre {
    /// Every split.
    const ALL: [Self; 5] = [Self::Gpt2, Self::Digits, Self::Llama3, Self::Qwen2, Self::Default];

    /// The split that a GGUF file names.
    ///
    /// # Errors
    /// A name that is not known.
    pub(super) fn of(metadata: &GgufMetadata) -> Result<Self> {
        if metadata.get(KEY).is_none() {
            tracing::warn!(key = KEY, "missing: using llama.cpp's default split into words");
            return Ok(Self::Default);
        }
        let found = metadata.str(KEY)?;
        let known = NAMES.iter().find(|(name, _)| *name == found).map(|(_, pre)| *pre);
        known.ok_or_else(|| ModelError::UnsupportedValue {
            key: KEY.to_owned(),
            found: found.to_owned(),
            supported: NAMES.map(|(name, _)| name).join(", "),
        })
    }

    /// The split that a `tokenizer.json` does, recognized by its structure.
    pub(super) fn recognize(tokenizer: &Value) -> Option<Self> {
        let steps = steps(&tokenizer["pre_tokenizer"])?;
        let pre = Self::ALL.into_iter().find(|pre| pre.steps() == steps)?;
        let normalizer = normalizers(&tokenizer["normalizer"])?;
        // Qwen2's files compose characters first. llama.cpp does not, and nearly all text is composed.
        let plain = normalizer.is_empty() || (pre == Self::Qwen2 && normalizer == ["NFC"]);
        let ignores = tokenizer.pointer("/model/ignore_merges").and_then(Value::as_bool);
        (plain && ignores.unwrap_or(false) == pre.ignores_merges()).then_some(pre)
    }

    /// The name that is written.
    pub(super) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, pre)| *pre == self).map_or("default", |(name, _)| name)
    }

    /// Whether a word that is a token stays whole.
    pub(super) fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }

    fn steps(self) -> Vec<Step> {
        let split = |pattern: &str| Step::Split(pattern.to_owned());
        match self {
            Self::Gpt2 => vec![Step::Bytes { split: true }],
            Self::Digits => vec![Step::Digits, Step::Bytes { split: true }],
            Self::Llama3 => vec![split(LLAMA3), Step::Bytes { split: false }],
            Self::Qwen2 => vec![split(QWEN2), Step::Bytes { split: false }],
            Self::Default => {
                DEFAULT.into_iter().map(split).chain([Step::Bytes { split: false }]).collect()
            }
        }
    }

    /// The split as the tokenizer library does it.
    pub(super) fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let step = |step| {
            Ok(match step {
                Step::Digits => PreTokenizerWrapper::Digits(Digits::new(true)),
                Step::Split(pattern) => PreTokenizerWrapper::Split(Split::new(
                    SplitPattern::Regex(pattern),
                    SplitDelimiterBehavior::Isolated,
                    false,
                )?),
                Step::Bytes { split } => {
                    PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, split))
                }
            })
        };
        let steps: tokenizers::Result<Vec<PreTokenizerWrapper>> =
            self.steps().into_iter().map(step).collect();
        let mut steps = steps?;
        Ok(match steps.len() {
            1 => steps.remove(0),
            _ => PreTokenizerWrapper::Sequence(Sequence::new(steps)),
        })
    }
}

/// The steps of a `pre_tokenizer`, if all of them are known.
fn steps(pre_tokenizer: &Value) -> Option<Vec<Step>> {
    let flag = |key: &str| pre_tokenizer[key].as_bool();
    Some(match pre_tokenizer["type"].as_str()? {
        "Sequence" => {
            let inner = pre_tokenizer["pretokenizers"].as_array()?;
            inner.iter().map(steps).collect::<Option<Vec<_>>>()?.concat()
        }
        "Digits" if flag("individual_digits") == Some(true) => vec![Step::Digits],
        "ByteLevel" if flag("add_prefix_space") == Some(false) => {
            vec![Step::Bytes { split: flag("use_regex").unwrap_or(true) }]
        }
        "Split" if pre_tokenizer["behavior"] == "Isolated" && flag("invert") != Some(true) => {
            vec![Step::Split(pre_tokenizer.pointer("/pattern/Regex")?.as_str()?.to_owned())]
        }
        _ => return None,
    })
}

/// The types of all normalizers.
fn normalizers(normalizer: &Value) -> Option<Vec<&str>> {
    if normalizer.is_null() {
        return Some(Vec::new());
    }
    match normalizer["type"].as_str()? {
        "Sequence" => {
            let inner = normalizer["normalizers"].as_array()?;
            Some(inner.iter().map(normalizers).collect::<Option<Vec<_>>>()?.concat())
        }
        kind => Some(vec![kind]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokenizer.json that splits as `pre` does.
    fn tokenizer(pre: Pre) -> Value {
        json!({
            "normalizer": null,
            "pre_tokenizer": serde_json::to_value(pre.pre_tokenizer().unwrap()).unwrap(),
            "model": {"ignore_merges": pre.ignores_merges()},
        })
    }

    #[test]
    fn every_split_is_recognized_from_its_own_structure() {
        for pre in Pre::ALL {
            assert_eq!(Pre::recognize(&tokenizer(pre)), Some(pre));
            assert_eq!(NAMES.iter().find(|(name, _)| *name == pre.name()).unwrap().1, pre);
        }
    }

    #[test]
    fn a_split_that_differs_a_little_is_not_recognized() {
        let edited = |pre, pointer: &str, value| {
            let mut tokenizer = tokenizer(pre);
            *tokenizer.pointer_mut(pointer).unwrap() = value;
            Pre::recognize(&tokenizer)
        };
        assert_eq!(edited(Pre::Llama3, "/model/ignore_merges", json!(false)), None);
        assert_eq!(edited(Pre::Gpt2, "/model/ignore_merges", json!(true)), None);
        assert_eq!(edited(Pre::Gpt2, "/pre_tokenizer/add_prefix_space", json!(true)), None);
        let digits = "/pre_tokenizer/pretokenizers/0/individual_digits";
        assert_eq!(edited(Pre::Digits, digits, json!(false)), None);
        let pattern = "/pre_tokenizer/pretokenizers/0/pattern/Regex";
        assert_eq!(edited(Pre::Qwen2, pattern, json!(r"\p{N}+")), None);
        assert_eq!(edited(Pre::Gpt2, "/normalizer", json!({"type": "Lowercase"})), None);
        assert_eq!(edited(Pre::Qwen2, "/normalizer", json!({"type": "NFC"})), Some(Pre::Qwen2));
        assert_eq!(edited(Pre::Gpt2, "/normalizer", json!({"type": "NFC"})), None);
        let none = json!({"type": "Sequence", "normalizers": []});
        assert_eq!(edited(Pre::Gpt2, "/normalizer", none), Some(Pre::Gpt2));
        assert_eq!(edited(Pre::Gpt2, "/pre_tokenizer", Value::Null), None);
    }
}
