//! Matrices on a device and their copies on the host.

use std::fmt::{self, Debug};

use half::bf16;
use sparsepack_formats::DType;

use super::{Result, error::shape_error};

/// Values of a host matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16: activations that only feed bf16 products.
    Bf16(Vec<bf16>),
}

/// A row-major matrix in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostMatrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows × cols` values.
    pub data: HostData,
}

/// Values of a matrix as files have them: row-major, little-endian, of a float type of weights.
#[derive(Debug, Clone, Copy)]
pub struct StoredValues<'a> {
    /// Element type.
    pub dtype: DType,
    /// The elements.
    pub bytes: &'a [u8],
}

impl StoredValues<'_> {
    /// Refuses another number of values than `rows × cols`, and types that are not of weights.
    pub(super) fn check(self, operation: &'static str, rows: usize, cols: usize) -> Result<()> {
        let Self { dtype, bytes } = self;
        if !dtype.is_float_weight() {
            return Err(shape_error(operation, format!("values of type {dtype}")));
        }
        if bytes.len() != rows * cols * dtype.size_bytes() {
            let detail = format!("{} bytes of {dtype} for [{rows}, {cols}]", bytes.len());
            return Err(shape_error(operation, detail));
        }
        Ok(())
    }
}

/// Values to be brought to the host by who waits for them, while the device goes on with other work. What they
/// come from is held until then, or until this is dropped.
pub struct Fetch<T>(Box<dyn FnOnce() -> Result<T> + Send + Sync>);

impl<T: Send + Sync + 'static> Fetch<T> {
    /// Values that `wait` brings.
    pub(crate) fn new(wait: impl FnOnce() -> Result<T> + Send + Sync + 'static) -> Self {
        Self(Box::new(wait))
    }

    /// Values that are there.
    pub(super) fn ready(values: T) -> Self {
        Self::new(|| Ok(values))
    }

    /// The same in another form.
    #[cfg(feature = "cuda")]
    pub(super) fn map<R: Send + Sync + 'static>(
        self,
        form: impl FnOnce(T) -> R + Send + Sync + 'static,
    ) -> Fetch<R> {
        Fetch::new(|| self.wait().map(form))
    }

    /// The values, once they are there. May be called on another thread than the device's.
    ///
    /// # Errors
    /// Device failure.
    pub fn wait(self) -> Result<T> {
        (self.0)()
    }
}

impl<T> Debug for Fetch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fetch")
    }
}

/// Memory of a device.
pub trait Storage: Sized + Send + Sync {
    /// A row-major matrix on the device. Its element type is the backend's business: f32, or bf16
    /// for activations that only feed matrix products.
    type Matrix: Debug + Send + Sync;
    /// One or several stacked weights `[out, in]`, laid out for
    /// [`BlockOps::linear`](super::BlockOps::linear).
    type Weight: Debug + Send + Sync;
    /// Values of a matrix on their way to the device.
    type Staged: Debug + Send + Sync;

    /// Device and arithmetic in words, for manifests: equal words mean equal bytes.
    fn describe(&self) -> String;

    /// Copies `rows × cols` values to the device.
    ///
    /// # Errors
    /// Wrong length; out of device memory.
    fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<Self::Matrix>;

    /// Begins to bring values to the device, which goes on with its other work meanwhile.
    ///
    /// # Errors
    /// Wrong length; a type that is not of weights; out of device memory.
    fn stage(&self, values: StoredValues<'_>, rows: usize, cols: usize) -> Result<Self::Staged>;

    /// Begins to bring a matrix to the device as [`stage`](Self::stage) does, its element type unchanged.
    ///
    /// # Errors
    /// Wrong length; out of device memory.
    fn bring(&self, matrix: &HostMatrix) -> Result<Self::Staged>;

    /// What was staged (as f32) or brought, once it is there. It can be had more than once.
    ///
    /// # Errors
    /// Out of device memory.
    fn receive(&self, staged: &Self::Staged) -> Result<Self::Matrix>;

    /// The values as f32.
    ///
    /// # Errors
    /// Device failure.
    fn download(&self, matrix: &Self::Matrix) -> Result<Vec<f32>>;

    /// A matrix of zeros (f32).
    ///
    /// # Errors
    /// Out of device memory.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Matrix>;

    /// A copy of a matrix.
    ///
    /// # Errors
    /// Out of device memory.
    fn duplicate(&self, matrix: &Self::Matrix) -> Result<Self::Matrix>;

    /// `(rows, cols)`.
    fn shape(&self, matrix: &Self::Matrix) -> (usize, usize);

    /// Bytes of memory that a matrix takes.
    fn bytes(matrix: &Self::Matrix) -> u64;

    /// Bytes of the device's own memory that nothing uses; `None` where its memory is the host's.
    ///
    /// # Errors
    /// Device failure.
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Moves a matrix to host memory with its element type unchanged.
    ///
    /// # Errors
    /// Device failure.
    fn offload(&self, matrix: Self::Matrix) -> Result<HostMatrix>;

    /// As [`offload`](Self::offload), beside the device's other work.
    ///
    /// # Errors
    /// Device failure.
    fn leave(&self, matrix: Self::Matrix) -> Result<Fetch<HostMatrix>> {
        self.offload(matrix).map(Fetch::ready)
    }

    /// Moves a matrix from host memory to the device with its element type unchanged.
    ///
    /// # Errors
    /// Out of device memory.
    fn onload(&self, matrix: HostMatrix) -> Result<Self::Matrix>;

    /// Waits until all that was begun is done, so that a clock can be read.
    ///
    /// # Errors
    /// Device failure, of an operation before this one as well.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// How many batches are best worked on at once with [`at_once`](Self::at_once). One where an
    /// operation fills the device by itself.
    fn lanes(&self) -> usize {
        1
    }

    /// Does `work` on every item, at the same time where the device can; results in the order of
    /// the items.
    fn at_once<T: Send, R: Send>(
        &self,
        items: Vec<T>,
        work: impl Fn(T) -> R + Send + Sync,
    ) -> Vec<R> {
        items.into_iter().map(work).collect()
    }

    /// Measured throughput of a large matrix product in the backend's arithmetic, FLOP/s: the
    /// ceiling that phase rates are compared with.
    ///
    /// # Errors
    /// Device failure.
    fn measure_gemm_ceiling(&self) -> Result<f64>;
}
