//! What a conversion tells its caller while it runs, and where its time goes.

use std::time::Instant;

use serde::Serialize;

/// Told how far a conversion is. The library never draws; the command line does.
pub trait Progress: Sync {
    /// The work is `units` long.
    fn start(&self, units: u64);
    /// `units` more are done.
    fn advance(&self, units: u64);
    /// A block is finished.
    fn block(&self, report: &BlockReport);
    /// All is done.
    fn finish(&self);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn block(&self, _: &BlockReport) {}
    fn finish(&self) {}
}

/// One finished block.
#[derive(Debug, Clone, Serialize)]
pub struct BlockReport {
    /// Decoder block.
    pub block: usize,
    /// Zeros among the weights of its linears.
    pub sparsity: f64,
    /// Mean relative output error of its solved layers, where the method knows it.
    pub relative_error: Option<f64>,
    /// Largest damping needed, as a fraction of the Hessian's mean diagonal.
    pub damp: Option<f64>,
    /// Stored bits per weight of its linears, where that is known before all is written.
    pub bits_per_weight: Option<f64>,
    /// Seconds it took.
    pub secs: f64,
    /// Resident memory now, where the system tells.
    pub rss_bytes: Option<u64>,
}

/// Kinds of work whose time is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Decoding weights and laying them out.
    Load,
    /// Forward passes.
    Forward,
    /// Accumulating statistics of activations.
    Statistics,
    /// Finding the principal directions of the residual stream.
    Eigen,
    /// Turning weights into another basis.
    Slice,
    /// Factorising Hessians.
    Factor,
    /// Choosing and updating weights.
    Sweep,
    /// Measuring output errors.
    Error,
    /// Rounding to what is stored, and encoding tensors that are only copied.
    Encode,
    /// Waiting for the writer, which encodes what was solved, hashes and writes beside the rest.
    Write,
}

impl Phase {
    /// Every phase in the order of a run.
    pub const ALL: [Self; 10] = [
        Self::Load,
        Self::Forward,
        Self::Statistics,
        Self::Eigen,
        Self::Slice,
        Self::Factor,
        Self::Sweep,
        Self::Error,
        Self::Encode,
        Self::Write,
    ];

    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Forward => "forward",
            Self::Statistics => "statistics",
            Self::Eigen => "eigen",
            Self::Slice => "slice",
            Self::Factor => "factor",
            Self::Sweep => "sweep",
            Self::Error => "error",
            Self::Encode => "encode",
            Self::Write => "write",
        }
    }
}

/// Seconds and floating-point operations of one phase.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct PhaseCost {
    /// Wall-clock seconds.
    pub secs: f64,
    /// Floating-point operations, two a multiply-add; 0 where the phase is not arithmetic.
    pub flops: f64,
}

/// Where the time of a run went.
#[derive(Debug, Clone, Default)]
pub struct PhaseTimes {
    costs: [PhaseCost; Phase::ALL.len()],
}

impl PhaseTimes {
    /// Runs `work` and charges its time to `phase`.
    pub fn time<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.costs[phase as usize].secs += start.elapsed().as_secs_f64();
        result
    }

    /// Charges seconds and operations to `phase`.
    pub fn charge(&mut self, phase: Phase, secs: f64, flops: f64) {
        self.costs[phase as usize].secs += secs;
        self.costs[phase as usize].flops += flops;
    }

    /// Adds what other work took.
    pub fn merge(&mut self, other: &Self) {
        for (cost, other) in self.costs.iter_mut().zip(&other.costs) {
            cost.secs += other.secs;
            cost.flops += other.flops;
        }
    }

    /// Every phase with its cost.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, PhaseCost)> + '_ {
        Phase::ALL.into_iter().map(|phase| (phase, self.costs[phase as usize]))
    }

    /// Operations of all phases.
    pub fn flops(&self) -> f64 {
        self.costs.iter().map(|cost| cost.flops).sum()
    }
}

/// Resident memory of this process: `(now, peak)` in bytes, where the system tells.
pub fn resident_bytes() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    };
    Some((field("VmRSS:")?, field("VmHWM:")?))
}
