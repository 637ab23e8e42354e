//! The architecture of the source tree, read from its own text.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::harness::root;

/// What each module of the root crate may use besides itself.
const MAY_USE: [(&str, &[&str]); 8] = [
    ("backend", &[]),
    ("model", &["backend"]),
    ("calibration", &["backend", "model"]),
    ("compress", &["backend", "calibration"]),
    ("recipe", &["compress"]),
    ("pipeline", &["backend", "model", "calibration", "compress", "recipe"]),
    ("eval", &["backend", "model", "calibration", "pipeline"]),
    ("cli", &["backend", "model", "calibration", "compress", "recipe", "pipeline", "eval"]),
];

/// Where `unsafe` may stand: the memory map, vector intrinsics, and NVIDIA's libraries.
const MAY_BE_UNSAFE: [&str; 4] = [
    "formats/src/reader.rs",
    "formats/src/encoding/sparse24/simd.rs",
    "src/backend/cpu/",
    "src/backend/cuda/driver/",
];

struct Line {
    path: String,
    number: usize,
    /// Without comments.
    code: String,
}

impl Line {
    fn module(&self) -> &str {
        self.path.strip_prefix("src/").and_then(|rest| rest.split(['/', '.']).next()).unwrap_or("")
    }

    fn place(&self) -> String {
        format!("{}:{}: {}", self.path, self.number, self.code.trim())
    }
}

fn lines(under: &str) -> Vec<Line> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join(under), &mut paths);
    paths.sort();
    paths.iter().flat_map(|path| code_of(path)).collect()
}

/// The lines of a file before its unit tests.
fn code_of(path: &Path) -> Vec<Line> {
    let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    if name.ends_with("tests.rs") || name.ends_with("conformance.rs") {
        return Vec::new();
    }
    let text = fs::read_to_string(path).unwrap();
    let product = text.lines().zip(1..).take_while(|(line, _)| line.trim() != "mod tests {");
    product
        .map(|(line, number)| Line {
            path: name.clone(),
            number,
            code: line.split("//").next().unwrap_or("").to_owned(),
        })
        .collect()
}

/// The top-level modules that a file names after `crate::`, alone or in a group.
fn used(lines: &[Line]) -> Vec<(&Line, String)> {
    let mut found = Vec::new();
    let mut depth = None;
    for line in lines {
        let code = line.code.as_str();
        for rest in code.split("crate::").skip(1) {
            let name: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.is_empty() {
                depth = Some(0);
            } else {
                found.push((line, name));
            }
        }
        if let Some(level) = &mut depth {
            let group = code.split_once("crate::").map_or(code, |(_, group)| group);
            let mut word = String::new();
            for c in group.chars().chain([' ']) {
                if c.is_alphanumeric() || c == '_' {
                    word.push(c);
                    continue;
                }
                if *level == 1 && !word.is_empty() && (c == ':' || c == ',') {
                    found.push((line, word.clone()));
                }
                // What follows a path separator is inside the module just named.
                word.clear();
                match c {
                    '{' => *level += 1,
                    '}' => *level -= 1,
                    _ => {}
                }
            }
            if *level == 0 {
                depth = None;
            }
        }
    }
    found
}

#[track_caller]
fn assert_none(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}\n{}", offenders.join("\n"));
}

#[test]
fn modules_use_only_what_is_below_them() {
    let lines = lines("src");
    let modules: BTreeSet<&str> = MAY_USE.iter().map(|(module, _)| *module).collect();
    let mut offenders = Vec::new();
    let mut seen = BTreeSet::new();
    for (line, name) in used(&lines) {
        let Some((module, allowed)) = MAY_USE.iter().find(|(module, _)| *module == line.module())
        else {
            continue;
        };
        seen.insert((*module, name.clone()));
        let fine = name == *module || allowed.contains(&name.as_str());
        if modules.contains(name.as_str()) && !fine {
            offenders.push(line.place());
        }
    }
    assert_none("a module uses one above it", &offenders);
    // The reading above would pass if it found nothing at all.
    assert!(seen.contains(&("pipeline", "recipe".to_owned())), "{seen:?}");
    assert!(seen.contains(&("cli", "eval".to_owned())), "{seen:?}");
}

#[test]
fn every_module_has_a_place_in_the_table() {
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(module, _)| *module).collect();
    let lines = lines("src");
    let found: BTreeSet<&str> = lines.iter().map(Line::module).collect();
    let outside: BTreeSet<&str> = found.difference(&known).copied().collect();
    assert_eq!(outside, BTreeSet::from(["lib", "main"]));
}

fn offenders(under: &str, words: &[&str], allowed: &[&str]) -> Vec<String> {
    lines(under)
        .iter()
        .filter(|line| words.iter().any(|word| line.code.contains(word)))
        .filter(|line| !allowed.iter().any(|place| line.path.starts_with(place)))
        .map(Line::place)
        .collect()
}

#[test]
fn only_the_pipeline_starts_threads() {
    let words = ["thread::spawn", "thread::scope", "thread::Builder"];
    assert_none("threads outside src/pipeline", &offenders("src", &words, &["src/pipeline/"]));
    assert_none("threads in formats", &offenders("formats/src", &words, &[]));
}

#[test]
fn only_the_command_line_prints() {
    let words = ["println!", "print!(", "io::stdout", "io::stderr", "stdout()", "stderr()"];
    assert_none("output outside src/cli", &offenders("src", &words, &["src/cli/"]));
    assert_none("output in formats", &offenders("formats/src", &words, &[]));
}

#[test]
fn only_the_command_line_parses_arguments() {
    let derives = ["clap::Args", "clap::Parser", "use clap", "clap::Command", "env::args"];
    assert_none("arguments outside src/cli", &offenders("src", &derives, &["src/cli/"]));
}

#[test]
fn solvers_and_models_know_no_files_of_the_output() {
    let words =
        ["std::fs", "File::open", "File::create", "OutputFile", "SafetensorsWriter", "&Path"];
    assert_none("files in src/compress", &offenders("src/compress", &words, &[]));
    // Compiled kernels are kept there.
    let cache = ["src/backend/cuda/driver/cache.rs"];
    assert_none("files in src/backend", &offenders("src/backend", &words, &cache));
}

#[test]
fn unsafe_stays_where_it_is_needed() {
    // `(unsafe_code` is where the lint is switched off.
    let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "(unsafe_code"];
    for under in ["src", "formats/src"] {
        let mut places = offenders(under, &words, &MAY_BE_UNSAFE);
        places.retain(|place| !place.contains("#![deny(unsafe_code)]"));
        assert_none("unsafe code elsewhere", &places);
    }
    let lib = fs::read_to_string(root().join("formats/src/lib.rs")).unwrap();
    assert!(lib.contains("#![deny(unsafe_code)]"), "formats does not deny unsafe code");
}

#[test]
fn formats_stays_small() {
    let manifest = fs::read_to_string(root().join("formats/Cargo.toml")).unwrap();
    let dependencies = manifest.split("[dependencies]").nth(1).unwrap();
    let dependencies = dependencies.split("\n[").next().unwrap();
    for heavy in ["clap", "rayon", "faer", "tokenizers", "sparsepack ="] {
        assert!(!dependencies.contains(heavy), "formats depends on {heavy}");
    }
}
