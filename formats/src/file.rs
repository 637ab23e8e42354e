//! Output files that appear under their final name only when complete.

/// A file being written as `NAME.part`.
#[derive(Debug)]
pub struct OutputFile;
