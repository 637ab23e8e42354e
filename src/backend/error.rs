//! Why a device operation failed.

use sparsepack_formats::DType;

/// Shorthand for results of backend operations.
pub type Result<T> = std::result::Result<T, BackendError>;

/// Why a device operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The device has no instructions for the arithmetic asked for.
    #[error("{device} has no {wanted} products; use --compute auto or f32")]
    PrecisionUnavailable {
        /// The device.
        device: String,
        /// The arithmetic.
        wanted: &'static str,
    },
    /// The thread pool could not be built.
    #[error("cannot start {threads} threads")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The system's reason.
        source: rayon::ThreadPoolBuildError,
    },
    /// A matrix is not positive definite.
    #[error("the matrix is not positive definite at pivot {pivot}")]
    NotPositiveDefinite {
        /// Index of the first pivot that is not positive.
        pivot: usize,
    },
    /// A matrix has no eigenvectors to be found: it holds NaN or infinity, or the iteration does not
    /// converge.
    #[error("the eigenvectors of a matrix of {size} rows cannot be found")]
    NoEigenvectors {
        /// Rows of the matrix.
        size: usize,
    },
    /// There is no such CUDA device.
    #[error("no CUDA device {wanted}: {reason}")]
    NoDevice {
        /// The device asked for.
        wanted: usize,
        /// Why it is not there.
        reason: String,
    },
    /// A library of NVIDIA's is missing.
    #[error(
        "{library}, which {purpose}, is not to be found; install the CUDA runtime libraries, 12 or 13, or put their folder into LD_LIBRARY_PATH"
    )]
    MissingLibrary {
        /// Its name.
        library: &'static str,
        /// What it is needed for.
        purpose: &'static str,
    },
    /// The device has too little memory.
    #[error(
        "{device} has no {wanted} bytes for {operation}: {free} of {total} bytes are free; a shorter --seq-len needs less, and --device cpu none"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// What the memory is for.
        operation: &'static str,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes that nothing uses.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// The kernels cannot be compiled for the device.
    #[error("{file} cannot be compiled for this device: {log}")]
    Kernels {
        /// The file of kernels.
        file: &'static str,
        /// What the compiler says.
        log: String,
    },
    /// The device failed.
    #[error("{device}: {operation}: {error}")]
    Device {
        /// The device.
        device: String,
        /// What it was doing; an error of an earlier operation can come to light here.
        operation: &'static str,
        /// What the driver or a library says.
        error: String,
    },
    /// A finite value rounds to infinity in the type that stores it.
    #[error("value {value:e} at index {index} is too large for {dtype}")]
    TooLarge {
        /// The value.
        value: f32,
        /// Where it stands in the matrix, row-major.
        index: usize,
        /// The type.
        dtype: DType,
    },
    /// Shapes that do not go together: a defect of the caller.
    #[error("{operation}: shapes do not fit: {detail}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// The shapes.
        detail: String,
    },
}

/// A defect of the caller.
pub(super) fn shape_error(operation: &'static str, detail: impl Into<String>) -> BackendError {
    BackendError::Shape { operation, detail: detail.into() }
}

/// Refuses a matrix of another shape: `(rows, columns)` each.
pub(super) fn expect_shape(
    operation: &'static str,
    found: (usize, usize),
    expected: (usize, usize),
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let ((got_rows, got_cols), (rows, cols)) = (found, expected);
    Err(shape_error(operation, format!("[{got_rows}, {got_cols}] instead of [{rows}, {cols}]")))
}
