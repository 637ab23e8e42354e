//! Checks an output against its manifest, its pattern and, where given, another checkpoint.

use std::path::Path;

use serde::Serialize;
use sparsepack_formats::{
    CheckpointReader, Digest, FormatError, ModelMetadata, encoding::MatrixShape,
};

use super::{
    error::Result,
    manifest::{Manifest, TensorRecord},
};
use crate::{
    compress::Sparsity,
    model::{GGUF_ROPE_FACTORS, ModelSource},
};

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
    let other = against.map(|path| Other::open(dir, path, reader.as_ref())).transpose()?;
    let mut report = VerifyReport {
        tensors: manifest.tensors.len(),
        checked: 0,
        bytes: 0,
        compared: 0,
        findings: Vec::new(),
    };
    let names = |name: &str| manifest.tensors.iter().any(|record| record.stored_name() == name);
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
            if let Err(what) = other.compare(record, reader.as_ref()) {
                report.find(&record.name, what);
            }
        }
        reader.release(&[record.stored_name()]);
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
    let Some(info) = reader.tensors().get(record.stored_name()) else {
        return Err("is in the manifest but not in the files".to_owned());
    };
    if info.shape != record.shape || info.encoding != record.encoding {
        return Err(format!(
            "expected {} {:?}, found {} {:?}",
            record.encoding, record.shape, info.encoding, info.shape
        ));
    }
    let text = |error: FormatError| error.to_string();
    let parts = reader.components(record.stored_name()).map_err(text)?;
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
    let values = reader.read_f32(record.stored_name()).map_err(text)?;
    let zeros = values.iter().filter(|&&value| value == 0.0).count() as u64;
    let zeroed = record.report.as_ref().map_or(0, |report| report.zeroed);
    let stored = record.report.as_ref().and_then(|report| report.stored_zeros);
    let expected = stored.unwrap_or(zeroed);
    if zeros < expected {
        return Err(format!("expected at least {expected} zeros, found {zeros}"));
    }
    if stored.is_some_and(|stored| stored < zeroed) {
        // The manifest says that the pattern was lost.
        return Ok(());
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

/// What an output is compared with.
#[derive(Debug)]
enum Other {
    /// A container with the same names.
    Reader(Box<dyn CheckpointReader>),
    /// One of the two is GGUF and the other is not, so tensors are compared as a model's.
    Models { ours: Box<ModelSource>, theirs: Box<ModelSource> },
}

impl Other {
    fn open(dir: &Path, against: &Path, ours: &dyn CheckpointReader) -> Result<Self> {
        let gguf =
            |reader: &dyn CheckpointReader| matches!(reader.metadata(), ModelMetadata::Gguf(_));
        let theirs = sparsepack_formats::open(against)?;
        if gguf(ours) == gguf(theirs.as_ref()) {
            return Ok(Self::Reader(theirs));
        }
        let ours = Box::new(ModelSource::open(dir)?);
        Ok(Self::Models { ours, theirs: Box::new(ModelSource::open(against)?) })
    }

    /// Whether the tensor decodes to the same bits there.
    fn compare(
        &self,
        record: &TensorRecord,
        reader: &dyn CheckpointReader,
    ) -> std::result::Result<(), String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let cols = MatrixShape::of(&record.shape).cols.max(1);
        match self {
            Self::Reader(other) => {
                let (name, path) = (record.stored_name(), other.path());
                if other.tensors().get(name).is_none() {
                    return Err(format!("is not in {}", path.display()));
                }
                let mine = reader.read_f32(name).map_err(|error| text(&error))?;
                let theirs = other.read_f32(name).map_err(|error| text(&error))?;
                same_bits(&mine, &theirs, cols, path)
            }
            Self::Models { ours, theirs } => {
                let read = |source: &ModelSource| {
                    if record.name == GGUF_ROPE_FACTORS {
                        return Ok(source.rope_factors().unwrap_or_default());
                    }
                    source.read_f32(&record.name).map_err(|error| text(&error))
                };
                same_bits(&read(ours)?, &read(theirs)?, cols, theirs.path())
            }
        }
    }
}

fn same_bits(
    mine: &[f32],
    theirs: &[f32],
    cols: usize,
    path: &Path,
) -> std::result::Result<(), String> {
    if mine.len() != theirs.len() {
        return Err(format!("has {} values here and {} there", mine.len(), theirs.len()));
    }
    match mine.iter().zip(theirs).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(index) => Err(format!(
            "row {}, column {}: {} here, {} in {}",
            index / cols,
            index % cols,
            mine[index],
            theirs[index],
            path.display()
        )),
    }
}
