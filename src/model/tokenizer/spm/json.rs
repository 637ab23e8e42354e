//! The vocabulary of a `tokenizer.json` that transformers made from a SentencePiece model.
//!
//! Scores are made from the ranks of the merges, the first 0 and each next token 1 less, then the
//! tokens that no merge makes in the order of their ids: the scores that SentencePiece's trainer gives.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use super::super::super::error::Result;
use super::{
    BYTE, MAX_TOKENS, NORMAL, Pieces, SPACE, UNKNOWN, UNUSED, byte_token, check_length, defect,
    is_symbol, runs_of_one, splits,
};

/// Whether this is BPE that spells bytes as tokens of their own. Byte-level BPE has a character for each
/// byte and never falls back, whatever its `byte_fallback` says (transformers sets it for GGUF files).
pub(in super::super) fn is_sentencepiece(tokenizer: &Value) -> bool {
    let model = &tokenizer["model"];
    let spelled = model.pointer("/vocab/<0x0A>").is_some();
    model["type"] == "BPE"
        && (spelled || (model["byte_fallback"] == true && !is_byte_level(tokenizer)))
}

fn is_byte_level(tokenizer: &Value) -> bool {
    let splitter = &tokenizer["pre_tokenizer"];
    let byte_level = |splitter: &Value| splitter["type"] == "ByteLevel";
    let parts = splitter["pretokenizers"].as_array();
    byte_level(splitter) || parts.is_some_and(|parts| parts.iter().any(byte_level))
}

/// The vocabulary with its added tokens. `settings`, from `tokenizer_config.json`, name the unknown token
/// where `tokenizer` does not.
///
/// # Errors
/// What llama.cpp would do otherwise, by name.
pub(super) fn pieces(path: &Path, tokenizer: &Value, settings: &Value) -> Result<Pieces> {
    let mut pieces = Pieces {
        tokens: Vec::new(),
        scores: Vec::new(),
        types: Vec::new(),
        space_prefix: space_prefix(path, tokenizer)?,
        ids: [None; 4],
    };
    let setting = &settings["unk_token"];
    let unknown = [&tokenizer["model"]["unk_token"], setting, &setting["content"]];
    let unknown = unknown.into_iter().find_map(Value::as_str);
    let bytes: HashSet<String> = (0..=u8::MAX).map(byte_token).collect();
    for (token, id) in vocab(path, tokenizer)? {
        let id = usize::try_from(id).ok().filter(|id| *id < MAX_TOKENS);
        let id = id
            .ok_or_else(|| defect(path, format!("token `{token}` has no id below {MAX_TOKENS}")))?;
        check_length(path, token)?;
        pieces.pad(id + 1);
        if pieces.types[id] != UNUSED {
            let other = &pieces.tokens[id];
            return Err(defect(path, format!("id {id} is that of `{other}` and of `{token}`")));
        }
        token.clone_into(&mut pieces.tokens[id]);
        pieces.scores[id] = 0.0;
        pieces.types[id] = match token {
            _ if Some(token) == unknown => UNKNOWN,
            _ if bytes.contains(token) => BYTE,
            _ => NORMAL,
        };
    }
    add(path, tokenizer, &mut pieces)?;
    score(path, tokenizer, &mut pieces)?;
    Ok(pieces)
}

/// Tokens and ids.
pub(super) fn vocab<'a>(path: &Path, tokenizer: &'a Value) -> Result<Vec<(&'a str, u64)>> {
    let vocab = tokenizer.pointer("/model/vocab").and_then(Value::as_object);
    let vocab = vocab.ok_or_else(|| defect(path, "no vocabulary".to_owned()))?;
    let id = |(token, id): (&'a String, &Value)| {
        let id = id.as_u64().ok_or_else(|| defect(path, format!("token `{token}` has no id")))?;
        Ok((token.as_str(), id))
    };
    vocab.iter().map(id).collect()
}

/// Puts the added tokens where their ids say.
pub(super) fn add(path: &Path, tokenizer: &Value, pieces: &mut Pieces) -> Result<()> {
    for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let id = added["id"].as_u64().and_then(|id| usize::try_from(id).ok());
        let (Some(id), Some(text)) = (id, added["content"].as_str()) else {
            return Err(defect(path, format!("added token {added} has no text or no id")));
        };
        pieces.add(path, id, text, added["special"].as_bool().unwrap_or(false))?;
    }
    Ok(())
}

/// Whether a text gets a space before it; U+2581 stands for spaces in every form that is known.
///
/// # Errors
/// Another way to normalize or split text, another way to merge.
pub(super) fn space_prefix(path: &Path, tokenizer: &Value) -> Result<bool> {
    let model = &tokenizer["model"];
    for (key, plain) in [
        ("byte_fallback", Value::Bool(true)),
        ("ignore_merges", Value::Bool(false)),
        ("dropout", Value::Null),
        ("continuing_subword_prefix", Value::Null),
        ("end_of_word_suffix", Value::Null),
    ] {
        let found = &model[key];
        let missing = found.is_null() && plain != Value::Bool(true);
        if !missing && *found != plain && *found != "" {
            let reason =
                format!("`{key}` is {found} (expected {plain}) in a SentencePiece vocabulary");
            return Err(defect(path, reason));
        }
    }
    let pre_tokenizer = &tokenizer["pre_tokenizer"];
    let known = match normalizer(&tokenizer["normalizer"]) {
        Some((true, prefix)) if pre_tokenizer.is_null() => Some(prefix),
        Some((false, false)) => metaspace(pre_tokenizer),
        _ => None,
    };
    known.ok_or_else(|| {
        defect(
            path,
            "llama.cpp does not normalize and split text as this SentencePiece vocabulary says \
             (normalizer and pre_tokenizer); known are U+2581 for spaces, with or without one before \
             the text, and no split"
                .to_owned(),
        )
    })
}

/// Whether a normalizer replaces spaces and whether it puts one before the text, if that is all it
/// does.
fn normalizer(value: &Value) -> Option<(bool, bool)> {
    let steps = match value["type"].as_str() {
        None => &[][..],
        Some("Sequence") => value["normalizers"].as_array()?,
        Some(_) => std::slice::from_ref(value),
    };
    let prepends = |step: &Value| step["type"] == "Prepend" && is_space(&step["prepend"]);
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && is_space(&step["content"])
    };
    match steps {
        [] => Some((false, false)),
        [replace] if replaces(replace) => Some((true, false)),
        [prepend, replace] if prepends(prepend) && replaces(replace) => Some((true, true)),
        _ => None,
    }
}

/// Whether a pre-tokenizer puts a space before the text, if all else it does is to replace spaces.
fn metaspace(value: &Value) -> Option<bool> {
    let metaspace = value["type"] == "Metaspace" && is_space(&value["replacement"]);
    match value["prepend_scheme"].as_str().filter(|_| metaspace && value["split"] == false)? {
        "always" | "first" => Some(true),
        "never" => Some(false),
        _ => None,
    }
}

fn is_space(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.chars().eq([SPACE]))
}

/// Sets the scores.
fn score(path: &Path, tokenizer: &Value, pieces: &mut Pieces) -> Result<()> {
    let merges = super::super::merge_pairs(path, tokenizer)?;
    let ids = pieces.index(path)?;
    let mut order = Order::default();
    let mut pairs = HashSet::with_capacity(merges.len());
    for &(left, right) in &merges {
        let text = format!("{left}{right}");
        let id = ids.get(text.as_str()).copied();
        let id =
            id.ok_or_else(|| defect(path, format!("merge `{left}` `{right}` makes no token")))?;
        if !order.add(id, left.len(), |a, b| runs_of_one(&pieces.tokens[a], &pieces.tokens[b])) {
            let reason = format!(
                "the merges that make `{text}` do not follow each other, and llama.cpp ranks tokens, \
                 not merges"
            );
            return Err(defect(path, reason));
        }
        pairs.insert((left, right));
    }
    check_merges(path, pieces, &ids, &pairs)?;
    let mut next = order.shares.len();
    let scores = order.scores();
    for id in 0..pieces.tokens.len() {
        if let Some(&rank) = order.ranks.get(&id) {
            pieces.scores[id] = scores[rank];
        } else if pieces.types[id] == NORMAL {
            pieces.scores[id] = -(next as f32);
            next += 1;
        }
    }
    Ok(())
}

/// The order in which the merges make tokens.
///
/// The merges of a token must follow each other. Runs of one character may be mixed, as transformers
/// mixes tokens of one score: these get one score again.
#[derive(Default)]
struct Order {
    /// Place of each token by its id.
    ranks: HashMap<usize, usize>,
    /// Whether the token of a place has the score of the one before it.
    shares: Vec<bool>,
    /// Token of the last merge and bytes of its left part.
    last: Option<(usize, usize)>,
    /// Place from which every token is a run of the character of the last one.
    streak: usize,
    /// Whether left parts only became shorter since then, so that runs grow from the left.
    falling: bool,
}

impl Order {
    /// Takes the next merge, which makes `id`; `false` if its place is elsewhere.
    fn add(&mut self, id: usize, left: usize, alike: impl Fn(usize, usize) -> bool) -> bool {
        let last = self.last.replace((id, left));
        match last {
            Some((before, longer)) if alike(before, id) => self.falling &= left <= longer,
            _ => (self.streak, self.falling) = (self.shares.len(), true),
        }
        match self.ranks.get(&id) {
            None => {
                self.ranks.insert(id, self.shares.len());
                self.shares.push(false);
                true
            }
            Some(_) if last.is_some_and(|(before, _)| before == id) => true,
            Some(&rank) => {
                let mixed = rank >= self.streak && self.falling;
                if mixed {
                    self.shares[rank + 1..].fill(true);
                }
                mixed
            }
        }
    }

    /// The score of each place.
    fn scores(&self) -> Vec<f32> {
        let mut scores: Vec<f32> = Vec::with_capacity(self.shares.len());
        for (rank, shares) in self.shares.iter().enumerate() {
            let score = scores.last().copied().filter(|_| *shares).unwrap_or(-(rank as f32));
            scores.push(score);
        }
        scores
    }
}

/// Refuses a vocabulary with two symbols that llama.cpp would merge and the tokenizer does not.
fn check_merges(
    path: &Path,
    pieces: &Pieces,
    ids: &HashMap<&str, usize>,
    pairs: &HashSet<(&str, &str)>,
) -> Result<()> {
    let ordinary = |(_, kind): &(&String, &i32)| [NORMAL, BYTE].contains(kind);
    for (token, _) in pieces.tokens.iter().zip(&pieces.types).filter(ordinary) {
        for (left, right) in splits(token) {
            let merged = is_symbol(left, ids) && is_symbol(right, ids);
            if merged && !pairs.contains(&(left, right)) {
                let reason =
                    format!("llama.cpp would merge `{left}` and `{right}`, which no merge does");
                return Err(defect(path, reason));
            }
        }
    }
    Ok(())
}
