//! Calibration: which tokens the model sees, and what is recorded of them.

mod dataset;
mod hidden;
mod statistics;

pub use dataset::{CalibrationSet, DatasetError, Sampling, read_text};
pub use hidden::{HiddenError, HiddenStates, Kept, Parked};
pub use statistics::{StatKind, Statistic};
