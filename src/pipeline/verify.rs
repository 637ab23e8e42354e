//! Checks an output against its manifest, its pattern and, where given, another checkpoint.

use std::path::Path;

use serde::Serialize;
use sparsepack_formats::{CheckpointReader, Digest, FormatError, encoding::MatrixShape};

use super::{
    error::Result,
    manifest::{Manifest, TensorRecord},
};
use crate::compress::Sparsity;

/// What to check.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Share of the tensors to check, spread evenly; all when `None`.
    pub sample: Option<f64>,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// The tensor, or the file.
    pub subject: String,
    /// What is wrong, expected and found.
    pub what: String,
}

/// What a verification looked at and found.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// Tensors in the manifest.
    pub tensors: usize,
    /// Tensors checked.
    pub checked: usize,
    /// Bytes hashed.
    pub bytes: u64,
    /// Tensors compared with the other checkpoint.
    pub compared: usize,
    /// Everything that is wrong.
    pub findings: Vec<Finding>,
}

/// Verifies the output in `dir`: digests, sparsity pattern and zero counts; with `against`, that
/// every tensor checked decodes to the same bits as the tensor of that name there.
///
/// # Errors
/// The output or the other checkpoint cannot be opened. What is wrong with the data is not an
/// error but a finding.
pub fn verify(dir: &Path, against: Option<&Path>, options: &VerifyOptions) -> Result<VerifyReport> {
    let manifest = Manifest::read(dir)?;
    let reader = sparsepack_formats::open(dir)?;
    let other = against.map(sparsepack_formats::open).transpose()?;
    let mut report = VerifyReport {
        tensors: manifest.tensors.len(),
        checked: 0,
        bytes: 0,
        compared: 0,
        findings: Vec::new(),
    };
    let names = |name: &str| manifest.tensors.iter().any(|record| record.name == name);
    for info in reader.tensors().iter().filter(|info| !names(&info.name)) {
        report.find(&info.name, "is in the files but not in the manifest".to_owned());
    }
    let every = options.sample.map_or(1, |share| (1.0 / share).round().max(1.0) as usize);
    for record in manifest.tensors.iter().step_by(every) {
        report.checked += 1;
        if let Err(what) = check_tensor(record, reader.as_ref(), &mut report.bytes) {
            report.find(&record.name, what);
            continue;
        }
        if let Some(other) = &other {
            report.compared += 1;
            if let Err(what) = compare(&record.name, reader.as_ref(), other.as_ref()) {
                report.find(&record.name, what);
            }
        }
        reader.release(&[&record.name]);
    }
    Ok(report)
}

impl VerifyReport {
    fn find(&mut self, subject: &str, what: String) {
        self.findings.push(Finding { subject: subject.to_owned(), what });
    }
}

fn check_tensor(
    record: &TensorRecord,
    reader: &dyn CheckpointReader,
    bytes: &mut u64,
) -> std::result::Result<(), String> {
    let Some(info) = reader.tensors().get(&record.name) else {
        return Err("is in the manifest but not in the files".to_owned());
    };
    if info.shape != record.shape || info.encoding != record.encoding {
        return Err(format!(
            "expected {} {:?}, found {} {:?}",
            record.encoding, record.shape, info.encoding, info.shape
        ));
    }
    let text = |error: FormatError| error.to_string();
    let parts = reader.components(&record.name).map_err(text)?;
    if parts.len() != record.components.len() {
        let expected = record.components.len();
        return Err(format!("expected {expected} components, found {}", parts.len()));
    }
    for (component, part) in record.components.iter().zip(&parts) {
        *bytes += part.len() as u64;
        let found = Digest::of(part);
        if found != component.sha256 {
            return Err(format!(
                "component {}: expected sha256 {}, found {found}",
                component.name, component.sha256
            ));
        }
    }
    let Some(pruned) = &record.pruned else { return Ok(()) };
    let values = reader.read_f32(&record.name).map_err(text)?;
    let zeros = values.iter().filter(|&&value| value == 0.0).count() as u64;
    if zeros < pruned.report.zeroed {
        return Err(format!("expected at least {} zeros, found {zeros}", pruned.report.zeroed));
    }
    if let Sparsity::NofM { n, m } = pruned.sparsity {
        let cols = MatrixShape::of(&record.shape).cols;
        let full =
            values.chunks(m).position(|group| group.iter().filter(|v| **v != 0.0).count() > n);
        if let Some(group) = full {
            let index = group * m;
            return Err(format!(
                "row {}, column {}: more than {n} of {m} weights are not zero",
                index / cols,
                index % cols
            ));
        }
    }
    Ok(())
}

fn compare(
    name: &str,
    reader: &dyn CheckpointReader,
    other: &dyn CheckpointReader,
) -> std::result::Result<(), String> {
    let text = |error: FormatError| error.to_string();
    let Some(info) = other.tensors().get(name) else {
        return Err(format!("is not in {}", other.path().display()));
    };
    let mine = reader.read_f32(name).map_err(text)?;
    let theirs = other.read_f32(&info.name).map_err(text)?;
    if mine.len() != theirs.len() {
        return Err(format!("has {} values here and {} there", mine.len(), theirs.len()));
    }
    let cols = MatrixShape::of(&info.shape).cols.max(1);
    match mine.iter().zip(&theirs).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(index) => Err(format!(
            "row {}, column {}: {} here, {} in {}",
            index / cols,
            index % cols,
            mine[index],
            theirs[index],
            other.path().display()
        )),
    }
}
