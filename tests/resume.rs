//! Interrupted conversions: killed after a checkpoint, continued, and equal to the last byte.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    harness::{
        Command, Dir, Ran, assert_resumes, assert_same_files, checkpoints, convert, copy_dir,
        fixture, kill_when, wait_until,
    },
    malformed::SmallDisk,
};

/// Slow enough to be caught between two blocks.
const SLOW: [&str; 12] = [
    "--prune",
    "sparsegpt",
    "--sparsity",
    "2:4",
    "--samples",
    "64",
    "--seq-len",
    "256",
    "--compute",
    "f32",
    "--threads",
    "1",
];
const TEXT: &str = "fixtures/text/calibration.txt";

fn slow(model: &Path, out: &Path) -> Command {
    slow_as(model, out, &["--format", "packed"])
}

fn slow_as(model: &Path, out: &Path, format: &[&str]) -> Command {
    let often = ["--checkpoint-secs", "0", "--calibration", TEXT];
    convert(model, out).args(SLOW).args(often).args(format)
}

fn journal(out: &Path) -> PathBuf {
    out.join(".work/journal.jsonl")
}

/// Kills the run of `command` when the journal has `count` lines.
#[track_caller]
fn kill_at(command: Command, out: &Path, count: usize) {
    kill_when(command, out, || checkpoints(out) >= count);
}

/// A run of the fixture model, killed after `count` checkpoints.
fn killed(dir: &Dir, count: usize) -> PathBuf {
    let out = dir.join("out");
    kill_at(slow(&fixture("model"), &out), &out, count);
    out
}

/// What the interrupted runs must end as.
fn uninterrupted(dir: &Dir) -> PathBuf {
    let out = dir.join("whole");
    slow(&fixture("model"), &out).succeeds();
    out
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let dir = Dir::new();
    let whole = uninterrupted(&dir);
    for count in 1..=3 {
        let out = dir.join(&format!("killed-{count}"));
        kill_at(slow(&fixture("model"), &out), &out, count);
        assert_resumes(slow(&fixture("model"), &out), &out, &whole);
    }
}

#[test]
fn a_killed_gguf_run_goes_on_to_the_same_bytes() {
    let dir = Dir::new();
    let (whole, out) = (dir.join("whole"), dir.join("out"));
    // Lossy for the pruned layers, with zeros lost, so that reports carry all they can.
    let format = ["--format", "gguf", "--dtype", "q5_k", "--allow-zero-loss"];
    let run = |out: &Path| slow_as(&fixture("model"), out, &format);
    run(&whole).succeeds();
    kill_at(run(&out), &out, 2);
    assert!(out.join("model.gguf.part").is_file() && !out.join("model.gguf").exists());
    run(&out).arg("--resume").succeeds();
    assert_same_files(&whole, &out);
}

#[test]
fn a_run_killed_again_and_again_goes_on() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    // What a crash in the middle of a line leaves.
    let mut text = fs::read(journal(&out)).unwrap();
    text.extend_from_slice(b"{\"blocks_done\":2,\"tens");
    fs::write(journal(&out), text).unwrap();
    for count in 2..=3 {
        kill_at(slow(&fixture("model"), &out).arg("--resume"), &out, count);
    }
    slow(&fixture("model"), &out).arg("--resume").succeeds();
    assert_same_files(&uninterrupted(&dir), &out);
}

#[test]
fn a_killed_compressed_run_goes_on_to_the_same_bytes() {
    let dir = Dir::new();
    let whole = dir.join("whole");
    slow_as(&fixture("model"), &whole, &["--format", "zst"]).succeeds();
    for count in 1..=3 {
        let out = dir.join(&format!("killed-{count}"));
        kill_at(slow_as(&fixture("model"), &out, &["--format", "zst"]), &out, count);
        // What a crash leaves behind the last whole frame.
        let part = out.join("model.spz.part");
        let mut bytes = fs::read(&part).unwrap();
        match count {
            1 => bytes.extend([0x28, 0xb5, 0x2f, 0xfd, 0x24]),
            2 => bytes.resize(bytes.len() + 4096, 0),
            _ => {}
        }
        fs::write(&part, bytes).unwrap();
        let again = || slow_as(&fixture("model"), &out, &["--format", "zst"]);
        if count == 1 {
            kill_at(again().arg("--resume"), &out, checkpoints(&out) + 1);
        }
        assert_resumes(again(), &out, &whole);
    }
}

#[test]
fn a_compressed_run_killed_after_its_last_tensor_goes_on() {
    let dir = Dir::new();
    let whole = dir.join("whole");
    slow_as(&fixture("model"), &whole, &["--format", "zst"]).succeeds();
    let out = dir.join("out");
    kill_at(slow_as(&fixture("model"), &out, &["--format", "zst"]), &out, 3);
    // As if the file had been finished and renamed, and the manifest not.
    fs::remove_file(out.join("model.spz.part")).unwrap();
    fs::copy(whole.join("model.spz"), out.join("model.spz")).unwrap();
    slow_as(&fixture("model"), &out, &["--format", "zst"]).arg("--resume").succeeds();
    assert_same_files(&whole, &out);
}

#[test]
fn damaged_compressed_output_is_refused() {
    let dir = Dir::new();
    let out = dir.join("out");
    kill_at(slow_as(&fixture("model"), &out, &["--format", "zst"]), &out, 1);
    let part = out.join("model.spz.part");
    let mut bytes = fs::read(&part).unwrap();
    // In the embedding, which comes first.
    bytes[20_000] ^= 1;
    fs::write(&part, bytes).unwrap();
    let command = slow_as(&fixture("model"), &out, &["--format", "zst"]).arg("--resume");
    let told = ["model.spz.part: tensor `model.embed_tokens.weight`: the frame at offset 24"];
    refused(command, &out, 1, &told);
}

#[test]
fn saved_activations_never_replace_those_still_needed() {
    let dir = Dir::new();
    let out = killed(&dir, 2);
    kill_at(slow(&fixture("model"), &out).arg("--resume"), &out, 3);
    let text = fs::read_to_string(journal(&out)).unwrap();
    let names: Vec<String> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["hidden"]["file"].as_str().unwrap().to_owned())
        .collect();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
}

#[cfg(unix)]
#[test]
fn a_terminated_run_goes_on() {
    let dir = Dir::new();
    let out = dir.join("out");
    let mut child = slow(&fixture("model"), &out).spawn();
    wait_until(&mut child, || checkpoints(&out) >= 1);
    let pid = child.id().to_string();
    // Not SIGINT: shells start background jobs, and so this test, with that one ignored.
    std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(!child.wait().unwrap().success());
    slow(&fixture("model"), &out).arg("--resume").succeeds();
    Command::new("verify").arg(&out).succeeds();
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_again() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    fs::write(journal(&out), "").unwrap();
    let ran = slow(&fixture("model"), &out).arg("--resume").succeeds();
    assert!(ran.stderr().contains("block=0"), "{}", ran.story());
    Command::new("verify").arg(&out).succeeds();
}

#[test]
fn fewer_threads_and_less_memory_may_change() {
    let dir = Dir::new();
    let out = killed(&dir, 2);
    slow(&fixture("model"), &out).args(["--resume", "--memory", "1MiB"]).succeeds();
    assert_same_files(&uninterrupted(&dir), &out);
}

/// Expects a refusal that leaves the interrupted run as it was.
#[track_caller]
fn refused(command: Command, out: &Path, code: i32, parts: &[&str]) -> Ran {
    let before = checkpoints(out);
    let ran = command.fails(code);
    ran.says(parts);
    assert_eq!(checkpoints(out), before);
    ran
}

#[test]
fn another_run_is_refused() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    let model = fixture("model");
    let resume = |more: &[&str]| slow(&model, &out).arg("--resume").args(more.iter().copied());

    refused(slow(&model, &out), &out, 2, &["holds an interrupted conversion", "--resume"]);
    refused(
        resume(&["--ignore", "down_proj"]),
        &out,
        1,
        &["cannot resume: the plan (recipe and outputs) was", "and is now"],
    );
    refused(
        resume(&["--seed", "1"]),
        &out,
        1,
        &["cannot resume: the calibration text was", "and is now"],
    );

    let other = dir.join("other");
    copy_dir(&model, &other);
    let weights = other.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let from = bytes.len() / 2;
    bytes[from..].iter_mut().step_by(2).for_each(|byte| *byte ^= 1);
    fs::write(&weights, bytes).unwrap();
    let command = slow(&other, &out).arg("--resume");
    refused(command, &out, 1, &["cannot resume: the source was", "and is now"]);
}

#[test]
fn another_arithmetic_is_refused() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    let other = SLOW.map(|arg| if arg == "f32" { "auto" } else { arg });
    let command = convert(&fixture("model"), &out).args(other).args([
        "--format",
        "packed",
        "--calibration",
        TEXT,
        "--resume",
    ]);
    let ran = command.run();
    // On a machine without bf16 products both are f32.
    if ran.stderr().contains("cannot resume") {
        ran.exits(1).says(&["cannot resume: the arithmetic was", "and is now"]);
    } else {
        println!("skipped: this machine computes in f32 only");
    }
}

#[test]
fn damaged_activations_are_refused() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    let saved = out.join(".work/hidden-0.f32");
    let mut bytes = fs::read(&saved).unwrap();
    bytes[100] ^= 1;
    fs::write(&saved, bytes).unwrap();
    let resume = || slow(&fixture("model"), &out).arg("--resume");
    refused(resume(), &out, 1, &["hidden-0.f32 does not have the journal's digest"]);
    fs::remove_file(&saved).unwrap();
    refused(resume(), &out, 1, &["hidden-0.f32 is missing"]);
}

#[test]
fn damaged_output_is_refused() {
    let dir = Dir::new();
    let out = killed(&dir, 1);
    let part = out.join("model.safetensors.part");
    let mut bytes = fs::read(&part).unwrap();
    // In the embedding, which comes first.
    bytes[20_000] ^= 1;
    fs::write(&part, bytes).unwrap();
    let command = slow(&fixture("model"), &out).arg("--resume");
    refused(command, &out, 1, &["model.embed_tokens.weight", "sha256"]);
}

#[test]
fn nothing_to_resume() {
    let dir = Dir::new();
    let model = fixture("model");
    let resume = |out: &Path| convert(&model, out).arg("--resume");
    resume(&dir.join("none")).fails(1).says(&["cannot resume: it does not exist"]);
    fs::create_dir(dir.join("empty")).unwrap();
    resume(&dir.join("empty")).fails(1).says(&["cannot resume: there is no interrupted run in it"]);
    let done = dir.join("done");
    convert(&model, &done).succeeds();
    resume(&done).fails(2).says(&["holds a finished conversion"]);
}

#[test]
fn a_disk_that_fills_up_can_be_emptied_and_the_run_goes_on() {
    const SIZE: u64 = 72 << 20;
    let Some(disk) = SmallDisk::mount(SIZE) else { return };
    let dir = Dir::new();
    let out = disk.join("out");
    let mut child = slow(&fixture("model"), &out).spawn();
    wait_until(&mut child, || checkpoints(&out) >= 1);
    // Fills the disk; the error is the point.
    let _ = fs::write(disk.join("filler"), vec![1; SIZE as usize]);
    let ended = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert!(!out.join("manifest.json").exists());
    fs::remove_file(disk.join("filler")).unwrap();
    slow(&fixture("model"), &out).arg("--resume").succeeds();
    assert_same_files(&uninterrupted(&dir), &out);
}
