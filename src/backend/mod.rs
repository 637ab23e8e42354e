//! What a device must be able to do, and the one place that names concrete backends.
//!
//! Everything is a row-major matrix: activations are `[tokens, features]`, weights are
//! `[out_features, in_features]`. Sequence boundaries travel beside a matrix as [`SequenceLens`].
//! The forward pass and the solvers are written once against these traits; [`dispatch`] chooses
//! the backend at run time.

mod block_ops;
mod dense_ops;
mod error;
pub mod grid;
mod pack_ops;
mod solve_ops;
mod stat_ops;
mod storage;

#[cfg(test)]
mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::sync::Once;

pub use block_ops::{Activation, AttentionShape, BlockOps, RopeTables, SequenceLens};
pub use dense_ops::{Dense, DenseOps, Eigen};
pub use error::{BackendError, Result};
pub use grid::{Grid, Rounding, ScaleSearch, Scales};
pub use pack_ops::PackOps;
pub use solve_ops::{Selection, SolveOps, SweepRule};
pub use stat_ops::StatOps;
pub use storage::{Fetch, HostData, HostMatrix, Storage, StoredValues};

/// Everything a conversion needs from a device.
pub trait Backend: BlockOps + StatOps + SolveOps + DenseOps + PackOps {}
impl<T: BlockOps + StatOps + SolveOps + DenseOps + PackOps> Backend for T {}

/// Arithmetic of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// bf16 × bf16 products with f32 sums where the device has such instructions, else f32.
    #[default]
    Auto,
    /// f32 products throughout.
    F32,
    /// bf16 × bf16 products with f32 sums; an error where the device has no such instructions.
    Bf16,
}

/// Which device does the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The first NVIDIA GPU, or the CPU where there is none; which and why is logged.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// The NVIDIA GPU with this index.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// How to set the device up.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// Which device.
    pub device: Device,
    /// Arithmetic of matrix products.
    pub precision: Precision,
    /// Threads on the CPU; all cores when `None`.
    pub threads: Option<usize>,
}

/// Work that runs on whichever backend was chosen.
pub trait BackendJob {
    /// What the work produces.
    type Output: Send;
    /// Runs the work on `backend`.
    fn run<B: Backend>(self, backend: &B) -> Self::Output;
}

/// The best device there is, and in words which it is and why.
fn best_device() -> (Device, String) {
    #[cfg(feature = "cuda")]
    match cuda::probe(0) {
        Ok(name) => (Device::Cuda(0), format!("cuda:0, {name}")),
        Err(reason) => (Device::Cpu, format!("the CPU: {reason}")),
    }
    #[cfg(not(feature = "cuda"))]
    (Device::Cpu, "the CPU: this build has no other backend".to_owned())
}

/// What [`Device::Auto`] means here, logged once.
fn settle(device: Device) -> Device {
    static LOGGED: Once = Once::new();
    if device != Device::Auto {
        return device;
    }
    let (device, which) = best_device();
    LOGGED.call_once(|| tracing::info!("computing on {which}"));
    device
}

/// Runs `job` on the chosen device: the only function that names concrete backends.
///
/// # Errors
/// [`BackendError`] when the device cannot be set up as asked.
pub fn dispatch<J: BackendJob + Send>(options: DeviceOptions, job: J) -> Result<J::Output> {
    match settle(options.device) {
        Device::Cpu | Device::Auto => {
            let backend = cpu::Cpu::new(options.precision, options.threads)?;
            Ok(backend.scope(|| job.run(&backend)))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => {
            let backend = cuda::Cuda::new(index, options.precision, options.threads)?;
            Ok(backend.scope(|| job.run(&backend)))
        }
    }
}
