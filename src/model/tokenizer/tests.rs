//! Ids against llama.cpp's (`fixtures/golden/tokens`), and the files that transformers reads.

use std::path::Path;

use serde_json::Value;

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(path)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The SmolLM2 file that `fixtures/make/fetch_smollm2.sh` fetches.
fn smollm2() -> ModelSource {
    let fetched = "target/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    let path = std::env::var_os("SPARSEPACK_SMOLLM2")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(fetched), PathBuf::from);
    ModelSource::open(&path).unwrap()
}

/// A tokenizer written to a file and read back as a Hugging Face one.
fn written(source: &ModelSource) -> Tokenizer {
    let file = sidecars(source).unwrap().into_iter().find(|file| file.name == "tokenizer.json");
    let SidecarContent::Bytes(bytes) = file.unwrap().content else { panic!("not made by us") };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, bytes).unwrap();
    Tokenizer::from_file(&path).unwrap()
}

#[test]
#[ignore = "needs the file of fixtures/make/fetch_smollm2.sh"]
fn ids_of_the_smollm2_vocabulary_equal_llama_cpp() {
    let source = smollm2();
    for tokenizer in [Tokenizer::open(&source).unwrap(), written(&source)] {
        let golden = json("golden/tokens/tricky.json");
        let text = std::fs::read_to_string(fixtures().join("golden/tokens/tricky.txt")).unwrap();
        for (line, expected) in text.split('\n').zip(golden["lines"].as_array().unwrap()) {
            assert_eq!(tokenizer.encode(line).unwrap(), ids(expected), "{line:?}");
        }
        assert_eq!(tokenizer.encode(&text).unwrap(), ids(&golden["file"]));
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{text:?}");
        }
        for (name, expected) in json("golden/tokens/texts.json").as_object().unwrap() {
            let text = std::fs::read_to_string(fixtures().join("text").join(name)).unwrap();
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(ids.len() as u64, expected["tokens"].as_u64().unwrap());
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            let digest = sparsepack_formats::Digest::of(&bytes).to_string();
            assert_eq!(digest, expected["sha256"].as_str().unwrap(), "{name}");
        }
    }
}

#[test]
fn a_hugging_face_tokenizer_takes_special_tokens_for_text() {
    let tokenizer = Tokenizer::from_file(&fixtures().join("model/tokenizer.json")).unwrap();
    let ids = tokenizer.encode("a<|endoftext|>b").unwrap();
    assert!(ids.len() > 3 && !ids.contains(&0), "{ids:?}");
    let text = std::fs::read_to_string(fixtures().join("text/heldout.txt")).unwrap();
    let (whole, lines): (Vec<u32>, usize) = (
        tokenizer.encode(&text).unwrap(),
        text.split_inclusive('\n').map(|line| tokenizer.encode(line).unwrap().len()).sum(),
    );
    assert!(whole.len() > 10_000 && whole.len() <= lines, "no truncation");
}

#[test]
fn a_gguf_vocabulary_merges_and_splits_as_its_keys_say() {
    for name in ["llama-gqa.gguf", "qwen2.gguf"] {
        let source = ModelSource::open(&fixtures().join("tiny").join(name)).unwrap();
        for tokenizer in [Tokenizer::open(&source).unwrap(), written(&source)] {
            let tokens = |text: &str| -> Vec<String> {
                let ids = tokenizer.encode(text).unwrap();
                ids.iter().map(|id| tokenizer.inner.id_to_token(*id).unwrap()).collect()
            };
            assert_eq!(tokens("the in 12"), ["the", "Ġ", "in", "Ġ", "1", "2"]);
            assert_eq!(tokens("at an\n"), ["a", "t", "Ġa", "n", "Ċ"]);
            assert_eq!(tokenizer.vocab_size(), 96);
        }
    }
}

/// Metadata of a tokenizer with edited keys.
fn metadata(edit: &[(&str, &str)]) -> sparsepack_formats::gguf::GgufMetadata {
    use sparsepack_formats::gguf::{GgufArray, GgufMetadata, GgufValue};
    let mut metadata = GgufMetadata::new(Path::new("m.gguf"));
    let list = |items: &[&str]| GgufValue::Array(GgufArray::String(items.iter().collect()));
    metadata.set("tokenizer.ggml.model", GgufValue::String("gpt2".to_owned()));
    metadata.set("tokenizer.ggml.pre", GgufValue::String("gpt-2".to_owned()));
    metadata.set("tokenizer.ggml.tokens", list(&["a", "b", "ab", "<s>", "b1"]));
    metadata.set("tokenizer.ggml.merges", list(&["a b"]));
    let types = GgufValue::Array(GgufArray::I32(vec![1, 1, 1, 3, 4]));
    metadata.set("tokenizer.ggml.token_type", types);
    metadata.set("tokenizer.ggml.bos_token_id", GgufValue::U32(3));
    for (key, value) in edit {
        metadata.set(key, GgufValue::String((*value).to_owned()));
    }
    metadata
}

#[test]
fn tokenizers_of_other_kinds_are_refused_by_name() {
    let message = |key, value| {
        gguf::build(Path::new("m.gguf"), &metadata(&[(key, value)])).unwrap_err().to_string()
    };
    assert_eq!(
        message("tokenizer.ggml.model", "t5"),
        "configuration key `tokenizer.ggml.model` is t5, which is not supported; supported: gpt2, llama"
    );
    let unknown = message("tokenizer.ggml.pre", "tekken");
    assert!(unknown.contains("`tokenizer.ggml.pre` is tekken"), "{unknown}");
    assert!(unknown.contains("smollm") && unknown.contains("qwen2"), "{unknown}");
}

#[test]
fn control_tokens_are_text_and_user_defined_ones_are_not() {
    let build = |pre| {
        let inner = gguf::build(Path::new("m.gguf"), &metadata(&[("tokenizer.ggml.pre", pre)]));
        Tokenizer::new(Path::new("m.gguf"), inner.unwrap())
    };
    let tokenizer = build("gpt-2");
    assert_eq!(tokenizer.encode("ab").unwrap(), [2]);
    assert_eq!(tokenizer.encode("<s>ab1").unwrap(), [0, 4], "bytes without a token are dropped");
    // Prompts of transformers start with the first token where the file says so; ours never do.
    let inner = build("llama-bpe").inner;
    assert_eq!(inner.encode("ab", true).unwrap().get_ids(), [3, 2]);
    assert_eq!(inner.encode("ab", false).unwrap().get_ids(), [2]);
}

#[test]
fn sidecars_of_a_directory_are_copies_of_tokenizer_files() {
    let source = ModelSource::open(&fixtures().join("model")).unwrap();
    let files = sidecars(&source).unwrap();
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert!(files.iter().all(|file| matches!(&file.content, SidecarContent::Copy(_))));
}

#[test]
fn sidecars_of_a_gguf_file_name_its_special_tokens() {
    let source = ModelSource::open(&fixtures().join("tiny/llama-gqa.gguf")).unwrap();
    let files = sidecars(&source).unwrap();
    let content = |name: &str| -> Value {
        let file = files.iter().find(|file| file.name == name).unwrap();
        let SidecarContent::Bytes(bytes) = &file.content else { panic!("not made by us") };
        serde_json::from_slice(bytes).unwrap()
    };
    let config = content("tokenizer_config.json");
    assert_eq!(
        (&config["bos_token"], &config["eos_token"]),
        (&"<|bos|>".into(), &"<|eos|>".into())
    );
    assert_eq!(config["model_max_length"], 128);
    assert_eq!(content("generation_config.json")["eos_token_id"], 1);
    assert_eq!(content("tokenizer.json")["model"]["type"], "BPE");
}

#[test]
fn a_missing_tokenizer_is_named() {
    let source = ModelSource::open(&fixtures().join("tiny/llama-gqa")).unwrap();
    let error = Tokenizer::open(&source).unwrap_err();
    assert!(matches!(&error, ModelError::NoTokenizer { path } if path.ends_with("tokenizer.json")));
    assert!(sidecars(&source).unwrap().is_empty());
}
