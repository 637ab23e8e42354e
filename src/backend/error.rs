//! Why a device operation failed.

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
    /// Shapes that do not go together: a defect of the caller.
    #[error("{operation}: shapes do not fit: {detail}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// The shapes.
        detail: String,
    },
}
