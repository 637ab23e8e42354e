//! `OUT/.work`: what an interrupted conversion has finished, so that it can go on.
//!
//! `plan.json` says what the run is; `journal.jsonl` gets one line per checkpoint: the tensors
//! finished since the last one, with their digests, and the file that holds the activations which
//! enter the next block. A line is written only after everything it names is on disk. Two
//! activation files are kept, so a crash while writing one leaves the other.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use sparsepack_formats::{Digest, HashingWriter, OutputFile};

use super::{
    error::{PipelineError, Result},
    plan::ConversionPlan,
};
use crate::{
    backend::{Backend, HostData, HostMatrix},
    calibration::{HiddenStates, Kept, Parked},
    compress::LayerReport,
};

/// Name of the work directory inside the output.
pub(super) const WORK_DIR: &str = ".work";

/// Saved activations take turns under these names.
const HIDDEN_NAMES: [&str; 2] = ["hidden-0.f32", "hidden-1.f32"];

/// What must be the same for a run to go on: everything that decides bytes. Threads, memory,
/// checkpoint interval and logging may change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RunIdentity {
    /// Version of sparsepack.
    pub sparsepack: String,
    /// Digest of the plan: recipe with all defaults, blocks, outputs.
    pub plan: Digest,
    /// The source files.
    pub source: Vec<SourceProbe>,
    /// Digest of the calibration tokens.
    pub calibration: Option<Digest>,
    /// Device and arithmetic.
    pub device: String,
}

impl RunIdentity {
    /// The identity of a run.
    ///
    /// # Errors
    /// Serialisation failed: a defect.
    pub(super) fn new(
        plan: &ConversionPlan,
        source: Vec<SourceProbe>,
        calibration: Option<Digest>,
        device: &str,
    ) -> serde_json::Result<Self> {
        let mut recipe = plan.recipe.clone();
        // The tokens decide, not where the file lies.
        recipe.calibration.file = None;
        let decided = serde_json::to_vec(&(&recipe, &plan.blocks, &plan.tables, &plan.outputs))?;
        Ok(Self {
            sparsepack: env!("CARGO_PKG_VERSION").to_owned(),
            plan: Digest::of(&decided),
            source,
            calibration,
            device: device.to_owned(),
        })
    }

    fn differs(&self, before: &Self) -> Option<String> {
        let differ = |what: &str, before: &dyn std::fmt::Debug, now: &dyn std::fmt::Debug| {
            Some(format!("{what} was {before:?} and is now {now:?}"))
        };
        if self.sparsepack != before.sparsepack {
            return differ("the version of sparsepack", &before.sparsepack, &self.sparsepack);
        }
        if self.source != before.source {
            return differ("the source", &before.source, &self.source);
        }
        if self.calibration != before.calibration {
            return differ("the calibration text", &before.calibration, &self.calibration);
        }
        if self.device != before.device {
            return differ("the arithmetic", &before.device, &self.device);
        }
        if self.plan != before.plan {
            return differ("the plan (recipe and outputs)", &before.plan, &self.plan);
        }
        None
    }
}

/// A source file at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SourceProbe {
    /// Name without directories.
    pub file: String,
    /// Size.
    pub bytes: u64,
    /// Digest of pages spread over the file: tells checkpoints apart, not single bytes.
    pub pages: Digest,
}

/// One line of the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    /// Blocks finished so far.
    pub blocks_done: usize,
    /// Tensors finished since the last line, with the digests of their components.
    pub tensors: Vec<(String, Vec<Digest>)>,
    /// Reports of the layers solved since the last line.
    pub reports: Vec<LayerReport>,
    /// Activations entering the next block, where the run needs any.
    pub hidden: Option<HiddenFile>,
}

/// A file of activations.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct HiddenFile {
    /// Name inside the work directory.
    pub file: String,
    /// Digest of its bytes.
    pub sha256: Digest,
}

/// What an interrupted run has finished.
#[derive(Debug, Default)]
pub(super) struct Finished {
    /// Blocks finished.
    pub blocks_done: usize,
    /// Tensors finished, with the digests of their components.
    pub tensors: Vec<(String, Vec<Digest>)>,
    /// Reports of the layers solved.
    pub reports: Vec<LayerReport>,
    hidden: Option<HiddenFile>,
}

/// The journal of a run.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    file: File,
    interval: Duration,
    last: Instant,
    pending: Vec<(String, Vec<Digest>)>,
    pending_reports: Vec<LayerReport>,
    /// The activations that the last line names, which must survive until the next line.
    last_hidden: Option<String>,
}

impl Journal {
    /// Starts a journal in `out/.work`.
    ///
    /// # Errors
    /// The directory or its files cannot be written.
    pub(super) fn create(out: &Path, identity: &RunIdentity, interval: Duration) -> Result<Self> {
        let dir = out.join(WORK_DIR);
        std::fs::create_dir_all(&dir).map_err(io(&dir, "create the work directory"))?;
        let bytes = serde_json::to_vec_pretty(identity).map_err(json(&dir))?;
        OutputFile::write_whole(&dir.join("plan.json"), &bytes)?;
        Self::open(dir, interval, true)
    }

    /// Continues the journal of an interrupted run.
    ///
    /// # Errors
    /// [`PipelineError::Resume`] when there is none or when it belongs to another run.
    pub(super) fn resume(
        out: &Path,
        identity: &RunIdentity,
        interval: Duration,
    ) -> Result<(Self, Finished)> {
        let dir = out.join(WORK_DIR);
        let refuse = |why: String| PipelineError::Resume { path: out.to_owned(), why };
        let plan = std::fs::read(dir.join("plan.json"))
            .map_err(|_| refuse("there is no interrupted run in it".to_owned()))?;
        let before: RunIdentity = serde_json::from_slice(&plan).map_err(json(&dir))?;
        if let Some(difference) = identity.differs(&before) {
            return Err(refuse(difference));
        }
        let path = dir.join("journal.jsonl");
        let text = std::fs::read(&path).map_err(io(&path, "read the journal"))?;
        let mut finished = Finished::default();
        let mut promised = 0;
        for line in text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"))
        {
            // A torn last line is what a crash leaves; nothing after it was promised.
            let Ok(checkpoint) = serde_json::from_slice::<Checkpoint>(line) else { break };
            promised += line.len() as u64;
            finished.blocks_done = checkpoint.blocks_done;
            finished.tensors.extend(checkpoint.tensors);
            finished.reports.extend(checkpoint.reports);
            finished.hidden = checkpoint.hidden;
        }
        let mut journal = Self::open(dir, interval, false)?;
        journal.file.set_len(promised).map_err(io(&path, "drop the torn end of the journal"))?;
        journal.last_hidden = finished.hidden.as_ref().map(|hidden| hidden.file.clone());
        Ok((journal, finished))
    }

    fn open(dir: PathBuf, interval: Duration, fresh: bool) -> Result<Self> {
        let path = dir.join("journal.jsonl");
        let mut options = File::options();
        options.create(true).write(true);
        if fresh {
            options.truncate(true)
        } else {
            options.append(true)
        };
        let file = options.open(&path).map_err(io(&path, "open the journal"))?;
        Ok(Self {
            dir,
            file,
            interval,
            last: Instant::now(),
            pending: Vec::new(),
            pending_reports: Vec::new(),
            last_hidden: None,
        })
    }

    /// Where temporary files of the run belong.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether enough time has passed for another checkpoint to be worth its cost.
    pub(super) fn due(&self) -> bool {
        self.last.elapsed() >= self.interval
    }

    /// Remembers what a block finished until the next checkpoint.
    pub(super) fn note(&mut self, reports: &[LayerReport]) {
        self.pending_reports.extend_from_slice(reports);
    }

    /// Writes a checkpoint: everything named is on disk when this returns.
    ///
    /// # Errors
    /// The work directory cannot be written.
    pub(super) fn commit<B: Backend>(
        &mut self,
        b: &B,
        blocks_done: usize,
        tensors: Vec<(String, Vec<Digest>)>,
        hidden: Option<&mut HiddenStates<B>>,
    ) -> Result<()> {
        self.pending.extend(tensors);
        let hidden = hidden.map(|hidden| self.save_hidden(b, hidden)).transpose()?;
        let line = Checkpoint {
            blocks_done,
            tensors: std::mem::take(&mut self.pending),
            reports: std::mem::take(&mut self.pending_reports),
            hidden,
        };
        let mut text = serde_json::to_string(&line).map_err(json(&self.dir))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(io(&self.dir, "write the journal"))?;
        self.file.sync_data().map_err(io(&self.dir, "sync the journal"))?;
        self.last = Instant::now();
        Ok(())
    }

    /// Residual streams as little-endian f32, batch after batch.
    fn save_hidden<B: Backend>(
        &mut self,
        b: &B,
        hidden: &mut HiddenStates<B>,
    ) -> Result<HiddenFile> {
        let kept = self.last_hidden.as_deref();
        let [first, second] = HIDDEN_NAMES;
        let name = if kept == Some(first) { second } else { first };
        let path = self.dir.join(name);
        let part = self.dir.join(format!("{name}.part"));
        let file = File::create(&part).map_err(io(&part, "create"))?;
        let mut file = HashingWriter::new(file);
        for batch in 0..hidden.batches() {
            let kept = hidden.take(batch)?;
            let downloaded;
            let values = match &kept.residual {
                Parked::Host(HostMatrix { data: HostData::F32(values), .. }) => values,
                Parked::Device(matrix) => {
                    downloaded = b.download(matrix)?;
                    &downloaded
                }
                other => {
                    downloaded = b.download(&other.copy(b)?)?;
                    &downloaded
                }
            };
            file.write_all(bytemuck::cast_slice(values))
                .map_err(io(&part, "save the activations"))?;
            hidden.put(b, batch, kept)?;
        }
        let (file, sha256) = file.finish();
        file.sync_data().map_err(io(&part, "sync the activations"))?;
        std::fs::rename(&part, &path).map_err(io(&path, "rename the activations"))?;
        self.last_hidden = Some(name.to_owned());
        Ok(HiddenFile { file: name.to_owned(), sha256 })
    }

    /// Fills `hidden` with the activations of the last checkpoint.
    ///
    /// # Errors
    /// The file is missing or not what the journal says.
    pub(super) fn load_hidden<B: Backend>(
        &self,
        b: &B,
        finished: &Finished,
        hidden: &mut HiddenStates<B>,
        features: usize,
    ) -> Result<()> {
        let refuse = |why: String| PipelineError::Resume { path: self.dir.clone(), why };
        let Some(saved) = &finished.hidden else {
            return Err(refuse("the journal has no activations for the next block".to_owned()));
        };
        let path = self.dir.join(&saved.file);
        if !path.is_file() {
            return Err(refuse(format!("{} is missing", saved.file)));
        }
        if Digest::of_file(&path)? != saved.sha256 {
            return Err(refuse(format!("{} does not have the journal's digest", saved.file)));
        }
        let mut file = File::open(&path).map_err(io(&path, "open the saved activations"))?;
        for batch in 0..hidden.batches() {
            let tokens = hidden.lens(batch).tokens();
            let mut values = vec![0.0f32; tokens * features];
            file.read_exact(bytemuck::cast_slice_mut(&mut values))
                .map_err(io(&path, "read the saved activations"))?;
            let residual = HostMatrix { rows: tokens, cols: features, data: HostData::F32(values) };
            let residual = Parked::Device(b.onload(residual)?);
            hidden.put(b, batch, Kept { residual, input: None })?;
        }
        Ok(())
    }

    /// Removes the work directory of a finished run.
    ///
    /// # Errors
    /// It cannot be removed.
    pub(super) fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.dir).map_err(io(&self.dir, "remove the work directory"))
    }
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> PipelineError {
    let path = path.to_owned();
    move |source| PipelineError::Io { path, action, source }
}

fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> PipelineError {
    let path = path.to_owned();
    move |source| sparsepack_formats::FormatError::Json { path, source }.into()
}

/// Whether an interrupted conversion of `out` had come to its loop over blocks.
pub(super) fn exists(out: &Path) -> bool {
    out.join(WORK_DIR).join("plan.json").is_file()
}

/// Whether the output directory holds a run that can be continued.
pub(super) fn has_checkpoint(out: &Path) -> bool {
    let journal = out.join(WORK_DIR).join("journal.jsonl");
    std::fs::metadata(journal).is_ok_and(|metadata| metadata.len() > 0)
}
