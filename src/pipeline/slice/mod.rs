//! Slicing: before anything else a conversion turns the source into a narrower model, kept as an
//! ordinary checkpoint in the work directory, and goes on with that. So whatever can be done to a
//! model can be done to a sliced one, in the same run and with the same result as in a second.

mod account;
mod blocks;
mod correct;
mod plan;
mod shared;
mod stream;
mod weights;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};
use sparsepack_formats::{Digest, FormatError, OutputFile};

pub use account::{Sizes, SliceAccount};
pub(super) use plan::Slicing;

use super::{
    error::{PipelineError, Result},
    journal::{SourceProbe, WORK_DIR},
    loader::LoadedBlock,
    output::probe_source,
    plan::contradiction,
    progress::{Phase, PhaseTimes, Progress},
    run::RunOptions,
};
use crate::{
    backend::{Backend, BackendJob, DeviceOptions, dispatch},
    calibration::CalibrationSet,
    compress::{
        Basis,
        slicegpt::{Covariance, Rotation},
    },
    model::{ModelSource, sidecars},
    recipe::SliceRecipe,
};

/// Where the sliced model is kept inside the work directory.
const DIRECTORY: &str = "sliced";
/// Written when it is whole.
const MARKER: &str = "slice.json";

/// What must be the same for a finished slice to be used again, and what it came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Marker {
    sparsepack: String,
    recipe: SliceRecipe,
    dtype: sparsepack_formats::DType,
    source: Vec<SourceProbe>,
    calibration: Digest,
    device: String,
    kept_variance: Vec<f64>,
}

/// The slicing of a conversion.
pub(super) struct SliceJob<'a> {
    pub(super) source: &'a ModelSource,
    pub(super) slicing: &'a Slicing,
    pub(super) set: &'a CalibrationSet,
    /// Output directory of the conversion; exists.
    pub(super) out: &'a Path,
    pub(super) options: RunOptions,
    pub(super) progress: &'a dyn Progress,
}

/// A sliced model on disk.
#[derive(Debug)]
pub(super) struct Sliced {
    pub(super) model: ModelSource,
    /// Share of the variance of the stream along the kept directions, of each rotation.
    pub(super) kept_variance: Vec<f64>,
    pub(super) times: PhaseTimes,
}

/// Whether the work directory of `out` holds a finished slice.
pub(super) fn is_finished(out: &Path) -> bool {
    out.join(WORK_DIR).join(MARKER).is_file()
}

/// Makes the sliced model in the work directory of the output, or finds it there.
///
/// # Errors
/// A finished slice of something else; a source that cannot be read; statistics without enough
/// directions; device failure; I/O.
pub(super) fn slice(job: SliceJob<'_>, device: DeviceOptions) -> Result<Sliced> {
    dispatch(device, job)?
}

impl BackendJob for SliceJob<'_> {
    type Output = Result<Sliced>;

    fn run<B: Backend>(self, b: &B) -> Result<Sliced> {
        let mut marker = Marker {
            sparsepack: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: self.slicing.recipe.clone(),
            dtype: self.slicing.dtype,
            source: probe_source(self.source)?,
            calibration: self.set.digest,
            device: b.describe(),
            kept_variance: Vec::new(),
        };
        let mut times = PhaseTimes::default();
        let found = self.options.resume && is_finished(self.out);
        let directory = self.directory();
        if found {
            marker = self.found(marker)?;
        } else {
            // What is there was not finished.
            let _ = std::fs::remove_dir_all(&directory);
            let make = |source| self.io(source, "create the directory of the sliced model");
            std::fs::create_dir_all(&directory).map_err(make)?;
            marker.kept_variance = self.make(b, &directory, &mut times)?;
            self.put_beside(&directory)?;
            OutputFile::write_whole(&self.marker(), &self.json(&marker)?)?;
        }
        let model = ModelSource::open(&directory)?;
        Ok(Sliced { model, kept_variance: marker.kept_variance, times })
    }
}

impl SliceJob<'_> {
    fn directory(&self) -> PathBuf {
        self.out.join(WORK_DIR).join(DIRECTORY)
    }

    fn marker(&self) -> PathBuf {
        self.out.join(WORK_DIR).join(MARKER)
    }

    fn io(&self, source: std::io::Error, action: &'static str) -> PipelineError {
        PipelineError::Io { path: self.directory(), action, source }
    }

    fn json<T: Serialize>(&self, value: &T) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(value)
            .map_err(|source| FormatError::Json { path: self.directory(), source })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The marker of a finished slice, which must be one of what is asked for now.
    fn found(&self, wanted: Marker) -> Result<Marker> {
        let path = self.marker();
        let bytes = std::fs::read(&path).map_err(|source| self.io(source, "read the record"))?;
        let found: Marker =
            serde_json::from_slice(&bytes).map_err(|source| FormatError::Json { path, source })?;
        let wanted = Marker { kept_variance: found.kept_variance.clone(), ..wanted };
        if found == wanted {
            return Ok(found);
        }
        Err(PipelineError::Resume {
            path: self.out.to_owned(),
            why: "the model in it was sliced by another version or recipe, from another source or \
                  calibration text, or with other arithmetic"
                .to_owned(),
        })
    }

    /// Makes the tensors. Returns the share of the variance that each rotation keeps.
    fn make<B: Backend>(
        &self,
        b: &B,
        directory: &Path,
        times: &mut PhaseTimes,
    ) -> Result<Vec<f64>> {
        let batches = super::entry::batch_lens(self.set).len() as u64;
        // Two halves of each block to find the bases, four points and the output matrix to fit.
        let blocks = self.source.config().num_hidden_layers as u64;
        let fits = if self.slicing.fits() { 4 * blocks + 1 } else { 0 };
        self.progress.start((2 * blocks + fits) * batches);
        let kept = match self.slicing.recipe.basis {
            Basis::Shared => self.make_shared(b, directory, times)?,
            Basis::Block => self.make_in_blocks(b, directory, times)?,
        };
        self.progress.finish();
        Ok(kept)
    }

    /// A block of the source, ready to run; the next one is on its way.
    fn load<B: Backend>(
        &self,
        b: &B,
        block: usize,
        times: &mut PhaseTimes,
    ) -> Result<LoadedBlock<B>> {
        self.source.prefetch(block + 1);
        times.time(Phase::Load, || {
            let mut loaded = LoadedBlock::load(b, self.source, block)?;
            loaded.install_all(b)?;
            Ok(loaded)
        })
    }

    /// The kept directions of a stream.
    fn rotation<B: Backend>(
        &self,
        b: &B,
        covariance: &Covariance,
        times: &mut PhaseTimes,
    ) -> Result<Rotation> {
        let start = Instant::now();
        let rotation = Rotation::principal(b, covariance, self.slicing.width)?;
        // Reduction to a tridiagonal matrix and back, as LAPACK counts it.
        let flops = 22.0 / 3.0 * (self.slicing.hidden_size as f64).powi(3);
        times.charge(Phase::Eigen, start.elapsed().as_secs_f64(), flops);
        let (rank, all) = (rotation.rank(), self.slicing.hidden_size);
        let width = self.slicing.width;
        if rank < width {
            return Err(contradiction(format!(
                "the calibration text spans {rank} of {all} directions, fewer than the {width} \
                 that are to stay; give more text or a smaller width"
            )));
        }
        Ok(rotation)
    }

    /// Configuration and tokenizer.
    fn put_beside(&self, directory: &Path) -> Result<()> {
        for sidecar in sidecars(self.source)? {
            super::output::put_sidecar(directory, &sidecar)?;
        }
        let config = self.json(&self.slicing.model.json)?;
        OutputFile::write_whole(&directory.join("config.json"), &config)?;
        Ok(())
    }
}
