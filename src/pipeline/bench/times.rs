//! Phases of a layer, what is counted of them, and medians over rounds.

use std::time::Instant;

use serde::Serialize;

use crate::{
    backend::{Backend, BackendError},
    compress::LayerReport,
};

/// A phase of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerPhase {
    /// The weight, bf16, to the device, and widened there.
    Upload,
    /// `XᵀX` over all tokens, with the search for NaN and infinity before each batch.
    Gram,
    /// The factor of the inverse Hessian.
    Factor,
    /// SparseGPT's sweep with its lazy updates.
    Sweep,
    /// The output error: two quadratic forms.
    Error,
    /// Rounding to bf16, packing, and the packed bytes to the host.
    Pack,
}

impl LayerPhase {
    /// Every phase in the order of a round.
    pub const ALL: [Self; 6] =
        [Self::Upload, Self::Gram, Self::Factor, Self::Sweep, Self::Error, Self::Pack];

    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Gram => "gram",
            Self::Factor => "factor",
            Self::Sweep => "sweep",
            Self::Error => "error",
            Self::Pack => "pack",
        }
    }

    /// In what it computes, given the backend's products; nothing where it only moves bytes.
    fn arithmetic(self, products: &'static str) -> Option<&'static str> {
        match self {
            Self::Gram => Some(products),
            Self::Factor => Some("f64"),
            Self::Sweep | Self::Error => Some("f32"),
            Self::Upload | Self::Pack => None,
        }
    }
}

/// Median time of a phase, and its rates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PhaseTime {
    /// Which.
    pub phase: LayerPhase,
    /// Median of the counted rounds.
    pub seconds: f64,
    /// Operations; a multiply-add is two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops: Option<f64>,
    /// Bytes of the dense bf16 matrix that is moved or packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<f64>,
    /// Operations a second, in 10¹².
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tflops_per_sec: Option<f64>,
    /// Bytes a second, in 10⁹.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbytes_per_sec: Option<f64>,
    /// Share of the measured ceiling, which is in the arithmetic of products whatever the phase's is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_ceiling: Option<f64>,
    /// In what it computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arithmetic: Option<&'static str>,
}

impl PhaseTime {
    pub(super) fn new(
        phase: LayerPhase,
        seconds: f64,
        flops: Option<f64>,
        bytes: Option<f64>,
        products: &'static str,
        ceiling: f64,
    ) -> Self {
        // A phase too short for the clock has no rate.
        let rate = |count: f64| (seconds > 0.0).then(|| count / seconds);
        let speed = flops.and_then(rate);
        Self {
            phase,
            seconds,
            flops,
            bytes,
            tflops_per_sec: speed.map(|speed| speed / 1e12),
            gbytes_per_sec: bytes.and_then(rate).map(|rate| rate / 1e9),
            of_ceiling: speed.map(|speed| speed / ceiling),
            arithmetic: phase.arithmetic(products),
        }
    }
}

/// Seconds of one round by phase, and what came out.
#[derive(Debug, Default)]
pub(super) struct Round {
    seconds: [f64; LayerPhase::ALL.len()],
    pub(super) packed_bytes: u64,
    pub(super) report: Option<LayerReport>,
}

impl Round {
    pub(super) fn seconds(&self, phase: LayerPhase) -> f64 {
        self.seconds[phase as usize]
    }

    pub(super) fn add(&mut self, phase: LayerPhase, seconds: f64) {
        self.seconds[phase as usize] += seconds;
    }

    /// Does `work` between two readings of the clock at which the device is idle.
    pub(super) fn clock<B: Backend, T, E: From<BackendError>>(
        &mut self,
        b: &B,
        phase: LayerPhase,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        b.finish()?;
        let start = Instant::now();
        let done = work()?;
        b.finish()?;
        self.add(phase, start.elapsed().as_secs_f64());
        Ok(done)
    }
}

/// The middle value, or the mean of the two in the middle; 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => values[middle - 1].midpoint(values[middle]),
    }
}
