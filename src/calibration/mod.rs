//! Calibration: which tokens the model sees, and what is recorded of them.

mod dataset;

pub use dataset::{CalibrationSet, DatasetError, Sampling, read_text};
