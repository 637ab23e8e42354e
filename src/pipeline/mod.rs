//! From a checkpoint and a recipe to a finished output: plan, run, verify, unpack.
//!
//! [`convert`] is the whole of it; the loop over blocks is in `run.rs`.

mod archive;
mod bench;
mod budget;
mod copy;
mod encodings;
mod entry;
mod error;
mod fit;
mod foreign;
mod gguf;
mod journal;
mod loader;
mod manifest;
mod output;
mod packer;
mod plan;
mod progress;
mod quantize;
mod run;
mod slice;
mod stages;
mod stored;
mod support;
mod targets;
mod unpack;
mod verify;
mod workers;

use std::path::Path;

pub use bench::{LayerBench, LayerPhase, LayerTimes, PhaseTime};
pub use budget::MemoryBudget;
pub use encodings::Scan;
pub use error::{PipelineError, Result};
pub use fit::{Fitted, fit};
pub use gguf::Fallback;
pub use loader::{BlockReader, LoadedBlock, load_norm};
pub use manifest::{MANIFEST, Manifest, TensorRecord, Totals};
pub use plan::{BlockPlan, ConversionPlan, LayerPlan, OutputTensor, Pruning, TablePlan};
pub use progress::{
    BlockReport, NoProgress, Phase, PhaseCost, PhaseTimes, Progress, resident_bytes,
};
pub use quantize::Quantization;
pub use run::RunOptions;
pub use slice::{Sizes, SliceAccount};
pub use support::supports;
pub use unpack::unpack;
pub use verify::{Finding, VerifyOptions, VerifyReport, verify};

use run::{Conversion, Outcome};
use slice::{SliceJob, Sliced, Slicing};
use workers::Workers;

use crate::{
    backend::{DeviceOptions, dispatch},
    calibration::CalibrationSet,
    model::{ModelSource, sidecars},
    recipe::OutputFormat,
};

/// A finished conversion.
#[derive(Debug)]
pub struct Converted {
    /// What was written.
    pub manifest: Manifest,
    /// Where the time went.
    pub times: PhaseTimes,
    /// Measured throughput of large products, FLOP/s; absent when nothing was calibrated.
    pub gemm_ceiling: Option<f64>,
    /// Wall-clock seconds in all.
    pub secs: f64,
}

/// Converts `source` by `plan` into the directory `out`.
///
/// A failed run leaves nothing under a final name. A run that was interrupted after a checkpoint
/// can be continued with [`RunOptions::resume`]; a run that failed before one leaves nothing at
/// all.
///
/// # Errors
/// [`PipelineError`] naming what is wrong and where.
pub fn convert(
    source: &ModelSource,
    plan: &ConversionPlan,
    calibration: Option<&CalibrationSet>,
    out: &Path,
    device: DeviceOptions,
    options: RunOptions,
    progress: &dyn Progress,
) -> Result<Converted> {
    let start = std::time::Instant::now();
    // First of all, so that a tokenizer that cannot be written fails now and not at the end.
    let sidecars = match plan.format {
        // Tokenizer and configuration are in the file.
        OutputFormat::Gguf => Vec::new(),
        _ => sidecars(source)?,
    };
    let slicing = plan.slicing.as_deref();
    let sliced_bytes = slicing.map_or(0, Slicing::bytes);
    output::prepare(out, source.path(), options.resume, plan.output_bytes + sliced_bytes)?;
    let workers = Workers::new(device.threads);
    // Source digests need the whole input read once; that runs beside the conversion.
    let (outcome, digests) = std::thread::scope(|scope| {
        let digests = scope.spawn(|| output::source_digests(source));
        let outcome = slice(source, plan, calibration, out, device, options, progress);
        let outcome = outcome.and_then(|sliced| {
            // An interrupted run may have come no further than to its sliced model.
            let resume = options.resume && (sliced.is_none() || journal::exists(out));
            let options = RunOptions { resume, ..options };
            let source = sliced.as_ref().map_or(source, |sliced| &sliced.model);
            let job = Conversion { source, plan, calibration, out, options, workers, progress };
            let outcome = dispatch(device, job)??;
            Ok((sliced, outcome))
        });
        let digests = digests.join().map_err(|_| PipelineError::Thread { name: "digest" });
        (outcome, digests.and_then(|done| done))
    });
    let finished = outcome.and_then(|(sliced, mut outcome)| {
        if let Some(sliced) = &sliced {
            outcome.times.merge(&sliced.times);
        }
        let sliced = sliced.as_ref();
        output::complete(source, sliced, plan, out, digests?, &sidecars, outcome)
    });
    match finished {
        Ok((manifest, outcome)) => {
            let Outcome { times, gemm_ceiling, journal, .. } = outcome;
            journal.remove()?;
            let secs = start.elapsed().as_secs_f64();
            Ok(Converted { manifest, times, gemm_ceiling, secs })
        }
        Err(error) => {
            if !journal::has_checkpoint(out) && !slice::is_finished(out) {
                output::discard(out, |name| sidecars.iter().any(|sidecar| sidecar.name == name));
            }
            Err(error)
        }
    }
}

/// The sliced model that the conversion goes on with, where the plan slices.
fn slice(
    source: &ModelSource,
    plan: &ConversionPlan,
    set: Option<&CalibrationSet>,
    out: &Path,
    device: DeviceOptions,
    options: RunOptions,
    progress: &dyn Progress,
) -> Result<Option<Sliced>> {
    let (Some(slicing), Some(set)) = (plan.slicing.as_deref(), set) else { return Ok(None) };
    let job = SliceJob { source, slicing, set, out, options, progress };
    Ok(Some(slice::slice(job, device)?))
}
