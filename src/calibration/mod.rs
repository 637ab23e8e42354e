//! Calibration: which tokens the model sees, and what is recorded of them.
