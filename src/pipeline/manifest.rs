//! `manifest.json`: what a finished output holds and how it was made.
//!
//! It has no timestamps and no host names: the same input, recipe and arithmetic give the same
//! bytes. Its `recipe` reproduces the run (`convert --recipe manifest.json`).

use std::path::Path;

use serde::{Deserialize, Serialize};
use sparsepack_formats::{DType, Digest, Encoding};

use super::{
    error::{PipelineError, Result},
    plan::Pruning,
    slice::SliceAccount,
};
use crate::{
    compress::{LayerReport, Quantizer},
    recipe::{OutputFormat, Recipe},
};

/// The file's name.
pub const MANIFEST: &str = "manifest.json";

/// What a finished output holds and how it was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of sparsepack that wrote it.
    pub sparsepack: String,
    /// The recipe with every default filled in.
    pub recipe: Recipe,
    /// Container of the output.
    pub format: OutputFormat,
    /// Who reads the format, where that is not everyone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readers: Option<String>,
    /// Our name of the architecture.
    pub architecture: String,
    /// The files that were read.
    pub source: Vec<SourceFile>,
    /// How the model was sliced, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slice: Option<SliceAccount>,
    /// What the solvers learnt from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationRecord>,
    /// Device and arithmetic in words.
    pub device: String,
    /// Every tensor in output order.
    pub tensors: Vec<TensorRecord>,
    /// Sums.
    pub totals: Totals,
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Name without directories.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// Digest.
    pub sha256: Digest,
}

/// What the solvers learnt from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// Digest of the token ids, as little-endian u32, window after window.
    pub tokens_sha256: Digest,
    /// Windows.
    pub windows: usize,
    /// Tokens in all.
    pub tokens: usize,
}

/// One tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Hugging Face name.
    pub name: String,
    /// Name in the container, where that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_name: Option<String>,
    /// How it is stored.
    #[serde(flatten)]
    pub encoding: Encoding,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Stored pieces in order.
    pub components: Vec<ComponentRecord>,
    /// Bytes that it takes in a container that compresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed_bytes: Option<u64>,
    /// How it was pruned, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruned: Option<Pruning>,
    /// How it was quantized by a solver, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantized: Option<QuantizedRecord>,
    /// What that cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<LayerReport>,
}

impl TensorRecord {
    /// Name in the container.
    pub fn stored_name(&self) -> &str {
        self.stored_name.as_deref().unwrap_or(&self.name)
    }
}

/// One stored piece of a tensor, before compression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentRecord {
    /// Name in the container.
    pub name: String,
    /// Element type in the container.
    pub dtype: DType,
    /// Bytes.
    pub bytes: u64,
    /// Digest of the bytes.
    pub sha256: Digest,
}

/// How a tensor was quantized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedRecord {
    /// With or without error feedback.
    pub method: Quantizer,
    /// The grid, in words: `int4 g64 BF16`, `Q4_0`.
    pub grid: String,
    /// Whether columns were swept in the order of descending `diag H`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub act_order: bool,
}

/// Sums over all tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Weights of the model.
    pub parameters: u64,
    /// Weights in pruned layers.
    pub pruned_parameters: u64,
    /// Weights that pruning set to zero.
    pub zeroed: u64,
    /// Bytes of all tensors, as they are stored.
    pub bytes: u64,
    /// Bytes of the pruned tensors, as they are stored.
    pub pruned_bytes: u64,
    /// Bytes that all tensors would take stored dense in the same element types.
    pub dense_bytes: u64,
    /// Bytes that the pruned tensors would take stored dense in the same element types.
    pub pruned_dense_bytes: u64,
    /// Parameters of the tensors that a solver quantized.
    #[serde(default)]
    pub quantized_parameters: u64,
    /// Bytes of these tensors, as they are stored.
    #[serde(default)]
    pub quantized_bytes: u64,
}

impl Totals {
    /// Sums up tensor records.
    pub fn of(tensors: &[TensorRecord]) -> Self {
        let mut totals = Self::default();
        for tensor in tensors {
            let elements = tensor.shape.iter().map(|&n| n as u64).product::<u64>();
            let bytes = tensor.components.iter().map(|component| component.bytes).sum();
            let bytes: u64 = tensor.compressed_bytes.unwrap_or(bytes);
            let dense = elements * tensor.encoding.value_dtype().size_bytes() as u64;
            totals.parameters += elements;
            totals.bytes += bytes;
            totals.dense_bytes += dense;
            if tensor.pruned.is_some() {
                totals.pruned_parameters += elements;
                totals.zeroed += tensor.report.as_ref().map_or(0, |report| report.zeroed);
                totals.pruned_bytes += bytes;
                totals.pruned_dense_bytes += dense;
            }
            if tensor.quantized.is_some() {
                totals.quantized_parameters += elements;
                totals.quantized_bytes += bytes;
            }
        }
        totals
    }
}

impl Manifest {
    /// Reads the manifest of a finished output.
    ///
    /// # Errors
    /// [`PipelineError::NoManifest`].
    pub fn read(dir: &Path) -> Result<Self> {
        let no_manifest = |source: Box<dyn std::error::Error + Send + Sync>| {
            PipelineError::NoManifest { path: dir.to_owned(), source }
        };
        let bytes = std::fs::read(dir.join(MANIFEST)).map_err(|e| no_manifest(e.into()))?;
        serde_json::from_slice(&bytes).map_err(|e| no_manifest(e.into()))
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// Serialisation failed: a defect.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}
