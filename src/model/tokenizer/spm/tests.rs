//! The vocabulary of `fixtures/spm` in both of its files, ids against llama.cpp's, and refusals.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use prost::Message as _;
use serde_json::{Value, json};

use super::*;
use crate::model::Tokenizer;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/spm")
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture().join(name)).unwrap()).unwrap()
}

/// A directory with one of the two files, edited.
fn directory(file: &str, bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(file), bytes).unwrap();
    dir
}

fn model_only() -> tempfile::TempDir {
    directory(MODEL_FILE, &fs::read(fixture().join(MODEL_FILE)).unwrap())
}

/// Text and ids by llama.cpp.
fn cases() -> Vec<(String, Vec<u32>)> {
    let golden = json("ids.json");
    let case = |case: &Value| {
        let ids = serde_json::from_value(case["ids"].clone()).unwrap();
        (case["text"].as_str().unwrap().to_owned(), ids)
    };
    golden["cases"].as_array().unwrap().iter().map(case).collect()
}

fn tokenizer(pieces: &Pieces) -> Tokenizer {
    Tokenizer::new(Path::new("t"), pieces.tokenizer(Path::new("t")).unwrap())
}

#[test]
fn both_files_have_one_vocabulary() {
    let mut model = of_directory(model_only().path(), None, &Value::Null).unwrap().unwrap();
    assert_eq!(model.ids, [Some(0), Some(1), Some(2), None]);
    // The JSON lists the three special tokens as added ones; the model has no such list.
    for id in 0..3 {
        model.scores[id] = ADDED_SCORE;
    }
    let settings = json("tokenizer_config.json");
    let derived = json::pieces(Path::new("t"), &json("tokenizer.json"), &settings).unwrap();
    assert_eq!(derived.tokens, model.tokens);
    assert_eq!(derived.types, model.types);
    assert_eq!(derived.scores, model.scores);
    assert!(derived.space_prefix && model.space_prefix);
    let both = of_directory(&fixture(), Some(&json("tokenizer.json")), &settings).unwrap();
    assert_eq!(both.unwrap(), model);
}

#[test]
fn ids_equal_llama_cpp() {
    let dir = model_only();
    let pieces = of_directory(dir.path(), None, &Value::Null).unwrap().unwrap();
    let tokenizer = tokenizer(&pieces);
    let cases = cases();
    assert!(cases.len() > 100);
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
        let decoded = tokenizer.inner.decode(&ids, false).unwrap();
        assert_eq!(decoded, text.replace(SPACE, " "), "{text:?}");
    }
    let text = fs::read_to_string(fixture().join("../text/heldout.txt")).unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let heldout = &json("ids.json")["heldout"];
    assert_eq!(ids.len() as u64, heldout["tokens"].as_u64().unwrap());
    assert_eq!(sparsepack_formats::Digest::of(&bytes).to_string(), heldout["sha256"]);
}

/// The file of transformers puts no second space before a text that starts with one.
#[test]
fn the_json_file_differs_before_a_space_only() {
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    for (text, ids) in cases() {
        let same = tokenizer.encode(&text).unwrap() == ids;
        assert_eq!(same, !text.starts_with([' ', SPACE]), "{text:?}");
    }
}

#[test]
fn added_tokens_are_those_of_the_settings() {
    let dir = model_only();
    fs::write(dir.path().join("added_tokens.json"), r#"{"<pad>": 600, "<s>": 1}"#).unwrap();
    let settings = json!({"added_tokens_decoder": {
        "602": {"content": "<|end|>", "special": true},
        "603": {"content": "\u{2581}\u{2581}x"},
    }});
    let pieces = of_directory(dir.path(), None, &settings).unwrap().unwrap();
    assert_eq!(pieces.tokens[600..], ["<pad>", "[PAD601]", "<|end|>", "  x"]);
    assert_eq!(pieces.types[600..], [USER_DEFINED, UNUSED, CONTROL, USER_DEFINED]);
    assert_eq!(pieces.types[..3], [UNKNOWN, CONTROL, CONTROL]);
    let tokenizer = tokenizer(&pieces);
    let ids = tokenizer.encode("  x<pad><|end|>").unwrap();
    assert_eq!(ids[..2], [603, 600]);
    assert!(!ids.contains(&602), "text that looks like a control token is text");
}

/// The error for the edited `tokenizer.json`.
fn json_error(edit: impl FnOnce(&mut Value)) -> String {
    let mut tokenizer = json("tokenizer.json");
    edit(&mut tokenizer);
    let error = json::pieces(Path::new("t.json"), &tokenizer, &Value::Null).unwrap_err();
    assert!(matches!(&error, ModelError::Tokenizer { .. }));
    error.to_string()
}

#[test]
fn other_forms_of_the_json_file() {
    let with = |normalizer: Value, pre_tokenizer: Value| {
        let mut tokenizer = json("tokenizer.json");
        tokenizer["normalizer"] = normalizer;
        tokenizer["pre_tokenizer"] = pre_tokenizer;
        json::space_prefix(Path::new("t.json"), &tokenizer)
    };
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
    let both = json!({"type": "Sequence", "normalizers": [prepend, replace]});
    assert!(with(both.clone(), Value::Null).unwrap());
    assert!(!with(replace.clone(), Value::Null).unwrap());
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": split});
    assert!(with(Value::Null, metaspace("always", false)).unwrap());
    assert!(!with(Value::Null, metaspace("never", false)).unwrap());
    for (normalizer, pre_tokenizer) in [
        (Value::Null, Value::Null),
        (Value::Null, metaspace("always", true)),
        (both, metaspace("first", false)),
        (json!({"type": "NFKC"}), metaspace("first", false)),
        (json!({"type": "Sequence", "normalizers": [replace, prepend]}), Value::Null),
    ] {
        let error = with(normalizer, pre_tokenizer).unwrap_err().to_string();
        assert!(error.contains("does not normalize and split text as this"), "{error}");
    }
}

#[test]
fn byte_level_vocabularies_are_not_sentencepiece() {
    let model = json!({"type": "BPE", "byte_fallback": true, "vocab": {"a": 0}, "merges": []});
    let level = json!({"type": "ByteLevel", "add_prefix_space": false});
    let sequence = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, level]});
    for pre_tokenizer in [level, sequence] {
        assert!(!is_sentencepiece(&json!({"model": model, "pre_tokenizer": pre_tokenizer})));
    }
    assert!(is_sentencepiece(&json!({"model": model, "pre_tokenizer": null})));
}

#[test]
fn json_files_that_merge_otherwise_are_refused() {
    let model = |key: &'static str, value: Value| {
        json_error(move |tokenizer| tokenizer["model"][key] = value)
    };
    assert_eq!(
        model("dropout", json!(0.1)),
        "t.json: tokenizer: `dropout` is 0.1 (expected null) in a SentencePiece vocabulary"
    );
    let error = model("byte_fallback", json!(false));
    assert!(error.contains("`byte_fallback` is false (expected true)"), "{error}");
    let error = model("merges", json!([["\u{2581}", "t"], ["h", "e"], ["zzz", "z"]]));
    assert!(error.ends_with("merge `zzz` `z` makes no token"), "{error}");
    let error = json_error(|tokenizer| {
        tokenizer["model"]["merges"].as_array_mut().unwrap().remove(1);
    });
    assert!(error.ends_with("llama.cpp would merge `h` and `e`, which no merge does"), "{error}");
    let error = json_error(|tokenizer| {
        let merges = tokenizer["model"]["merges"].as_array_mut().unwrap();
        merges.push(merges[0].clone());
    });
    assert!(error.contains("the merges that make `\u{2581}t` do not follow each other"), "{error}");
    let vocab = |token: &'static str, id: Value| {
        json_error(move |tokenizer| tokenizer["model"]["vocab"][token] = id)
    };
    let error = vocab("more", json!(263));
    assert!(error.contains("id 263 is that of `\u{2581}the` and of `more`"), "{error}");
    let error = vocab("more", json!(1u64 << 40));
    assert!(error.ends_with("token `more` has no id below 1048576"), "{error}");
    let error = json_error(|tokenizer| tokenizer["added_tokens"][0]["id"] = json!(u64::MAX));
    assert!(error.contains("token `<unk>` has the id 18446744073709551615"), "{error}");
    let error = json_error(|tokenizer| {
        tokenizer["model"]["vocab"]["x".repeat(2000)] = json!(600);
    });
    assert!(error.ends_with("a token of 2000 bytes (expected at most 1024)"), "{error}");
}

/// The error for the edited `tokenizer.model`.
fn model_error(edit: impl FnOnce(&mut proto::ModelProto)) -> String {
    let bytes = fs::read(fixture().join(MODEL_FILE)).unwrap();
    let mut model = proto::ModelProto::decode(bytes.as_slice()).unwrap();
    edit(&mut model);
    let dir = directory(MODEL_FILE, &model.encode_to_vec());
    let pieces = of_directory(dir.path(), None, &Value::Null);
    let path = dir.path().join(MODEL_FILE);
    let error = pieces.and_then(|pieces| pieces.unwrap().tokenizer(&path)).unwrap_err().to_string();
    error.replace(&path.display().to_string(), "MODEL")
}

#[test]
fn models_of_other_kinds_are_refused() {
    assert_eq!(
        model_error(|model| model.trainer.as_mut().unwrap().model_type = None),
        "MODEL: tokenizer: a SentencePiece model of type unigram (expected BPE)"
    );
    let normalizer = |edit: fn(&mut proto::Normalizer)| {
        model_error(move |model| edit(model.normalizer.as_mut().unwrap()))
    };
    assert_eq!(
        normalizer(|normalizer| normalizer.character_map = Some(vec![1])),
        "MODEL: tokenizer: the normalizer maps characters (identity), which llama.cpp does not"
    );
    let error = normalizer(|normalizer| normalizer.fewer_spaces = None);
    assert!(error.contains("removes extra spaces"), "{error}");
    let error = normalizer(|normalizer| normalizer.escapes_spaces = Some(false));
    assert!(error.contains("does not put U+2581"), "{error}");
    let piece =
        |edit: fn(&mut proto::Piece)| model_error(move |model| edit(&mut model.pieces[270]));
    assert!(piece(|piece| piece.text = None).ends_with("piece 270 has no text"));
    assert!(piece(|piece| piece.kind = Some(7)).contains("is of type 7 (expected 1 to 6)"));
    assert!(piece(|piece| piece.score = Some(f32::NAN)).ends_with("has the score NaN"));
    assert!(piece(|piece| piece.score = Some(0.0)).contains(" both have the score "));
    let error = piece(|piece| piece.text = Some("he".to_owned()));
    assert!(error.ends_with("`he` is both token 260 and 270"), "{error}");
    let error = model_error(|model| model.pieces[13].text = Some("byte".to_owned()));
    assert!(error.ends_with("no token `<0x0A>`, so some text has none"), "{error}");
    let error = piece(|piece| piece.text = Some("\u{4e00}\u{4e01}".to_owned()));
    assert!(error.ends_with("is made of characters that have no token"), "{error}");
}

#[test]
fn files_that_contradict_each_other_are_refused() {
    let mut tokenizer = json("tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocab.remove("\u{2581}the");
    vocab.insert("other".to_owned(), json!(263));
    let error = of_directory(&fixture(), Some(&tokenizer), &Value::Null).unwrap_err().to_string();
    assert!(error.ends_with("id 263 is `other`, but `\u{2581}the` in tokenizer.model"), "{error}");
}

#[test]
fn a_file_of_another_kind_is_named() {
    let bytes = fs::read(fixture().join(MODEL_FILE)).unwrap();
    for (bytes, what) in [
        (&b"IQ== 0\nIg== 1\n"[..], "no SentencePiece model: "),
        (&bytes[..bytes.len() - 1], "no SentencePiece model: "),
        (&vec![0x0a; (16 << 20) + 1], "more than 16777216 bytes"),
    ] {
        let dir = directory(MODEL_FILE, bytes);
        let error = of_directory(dir.path(), None, &Value::Null).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model: tokenizer: ") && error.contains(what), "{error}");
    }
}

/// What llama.cpp does, read off its source: the two neighbours whose text is the token of the highest
/// score, the leftmost of equals, until there are none.
fn merged(pieces: &Pieces, text: &str) -> Vec<u32> {
    if text.is_empty() {
        return Vec::new();
    }
    let ids = pieces.index(Path::new("t")).unwrap();
    let text = format!("{SPACE}{}", text.replace(' ', "\u{2581}"));
    let mut symbols: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for left in 1..symbols.len() {
            let pair = symbols[left - 1].clone() + &symbols[left];
            let Some(&id) = ids.get(pair.as_str()) else { continue };
            if best.is_none_or(|(score, _)| pieces.scores[id] > score) {
                best = Some((pieces.scores[id], left));
            }
        }
        let Some((_, left)) = best else { break };
        let right = symbols.remove(left);
        symbols[left - 1] += &right;
    }
    let bytes = |symbol: &str| -> Vec<u32> {
        symbol.bytes().map(|byte| ids[byte_token(byte).as_str()] as u32).collect()
    };
    symbols
        .iter()
        .flat_map(|symbol| {
            ids.get(symbol.as_str()).map_or_else(|| bytes(symbol), |&id| vec![id as u32])
        })
        .collect()
}

/// The fixture with runs of 2 to `longest` spaces that share a score, as Llama 2 has them.
fn with_runs(longest: usize) -> Pieces {
    let mut pieces = of_directory(model_only().path(), None, &Value::Null).unwrap().unwrap();
    for length in 2..=longest {
        let run = String::from(SPACE).repeat(length);
        if !pieces.tokens.contains(&run) {
            pieces.tokens.push(run);
            pieces.types.push(NORMAL);
            pieces.scores.push(-1e9);
        }
    }
    pieces
}

#[test]
fn runs_of_spaces_may_share_a_score() {
    // A run of two is a piece of the fixture.
    let pieces = with_runs(16);
    assert_eq!(pieces.tokens.len(), 614);
    let tokenizer = tokenizer(&pieces);
    for spaces in 0..70 {
        let text = format!("the{}in {}", " ".repeat(spaces), "  ".repeat(spaces % 9));
        assert_eq!(tokenizer.encode(&text).unwrap(), merged(&pieces, &text), "{spaces} spaces");
    }
    // transformers mixes the merges of tokens of one score: by falling length of the left part.
    let mut written: Value =
        serde_json::from_str(&tokenizer.inner.to_string(false).unwrap()).unwrap();
    let run = |length: usize| String::from(SPACE).repeat(length);
    let merges = written["model"]["merges"].as_array_mut().unwrap();
    let runs = merges.iter().position(|merge| merge == &json!([run(15), run(1)])).unwrap();
    merges.truncate(runs);
    for left in (1..16).rev() {
        let rights = (1..=16 - left).rev().filter(|right| left + right > 2);
        merges.extend(rights.map(|right| json!([run(left), run(right)])));
    }
    let again = json::pieces(Path::new("t"), &written, &Value::Null).unwrap();
    let shared: Vec<f32> = again.scores[600..].to_vec();
    assert!(shared[0] < -200.0 && shared.iter().all(|score| score.total_cmp(&shared[0]).is_eq()));
    let tokenizer = self::tokenizer(&again);
    let text = format!("a{}b{}", " ".repeat(37), " ".repeat(11));
    assert_eq!(tokenizer.encode(&text).unwrap(), merged(&pieces, &text));
    // Growing short runs first is something else.
    let merges = written["model"]["merges"].as_array_mut().unwrap();
    let last = merges.len() - 1;
    merges.swap(last, runs + 1);
    let error = json::pieces(Path::new("t"), &written, &Value::Null).unwrap_err().to_string();
    assert!(error.contains("do not follow each other"), "{error}");
}

proptest! {
    #[test]
    fn any_text_is_merged_as_llama_cpp_does(text in "([a-e]| |  |\u{2581}|the|ing?|[0-9]|\n|\u{e9}|\u{1f600}|<s>|<0x41>){0,60}") {
        let pieces = with_runs(6);
        prop_assert_eq!(tokenizer(&pieces).encode(&text).unwrap(), merged(&pieces, &text));
    }

    /// Damage is an error or a vocabulary, never a panic.
    #[test]
    fn damaged_models_do_not_panic(at in 0usize..8000, with in any::<[u8; 3]>(), cut in 0usize..8600) {
        let mut bytes = fs::read(fixture().join(MODEL_FILE)).unwrap();
        bytes[at..at + 3].copy_from_slice(&with);
        bytes.truncate(cut.max(at + 3));
        let dir = directory(MODEL_FILE, &bytes);
        if let Ok(Some(pieces)) = of_directory(dir.path(), None, &Value::Null) {
            let _ = pieces.tokenizer(Path::new("t"));
        }
    }
}
