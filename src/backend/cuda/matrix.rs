//! Matrices in device memory.

use half::bf16;

use super::{
    Cuda, CudaStaged, Products,
    driver::{Arg, Geometry, KernelFile, Memory},
    pack,
};
pub(super) use crate::backend::error::shape_error;
use crate::backend::{Fetch, HostData, HostMatrix, Result, Storage, StoredValues, error};

/// Threads of a block of the element-wise kernels.
pub(super) const THREADS: usize = 256;
/// Blocks in y of kernels that step over rows.
pub(super) const ROW_BLOCKS: usize = 4096;

/// A row-major matrix of f32, or of bf16 where it only feeds products.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: Values,
}

/// Values of a matrix; at least one, so that there is memory to point to.
#[derive(Debug)]
pub(super) enum Values {
    F32(Memory<f32>),
    Bf16(Memory<bf16>),
}

/// One or several stacked weights `[out, in]`, in the type of products.
#[derive(Debug)]
pub struct CudaWeight(pub(super) CudaMatrix);

impl CudaMatrix {
    pub(super) fn f32(rows: usize, cols: usize, values: Memory<f32>) -> Self {
        Self { rows, cols, values: Values::F32(values) }
    }

    pub(super) fn bf16(rows: usize, cols: usize, values: Memory<bf16>) -> Self {
        Self { rows, cols, values: Values::Bf16(values) }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// The f32 values of an operand that is never bf16.
    pub(super) fn f32s(&self, operation: &'static str) -> Result<&Memory<f32>> {
        match &self.values {
            Values::F32(values) => Ok(values),
            Values::Bf16(_) => Err(shape_error(operation, "a bf16 operand")),
        }
    }

    /// The f32 values of an operand that is never bf16, to change.
    pub(super) fn f32s_mut(&mut self, operation: &'static str) -> Result<&mut Memory<f32>> {
        match &mut self.values {
            Values::F32(values) => Ok(values),
            Values::Bf16(_) => Err(shape_error(operation, "a bf16 operand")),
        }
    }

    pub(super) fn expect_shape(
        &self,
        operation: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        error::expect_shape(operation, (self.rows, self.cols), (rows, cols))
    }
}

/// A thread for each of `count` values.
pub(super) fn each(count: usize) -> Geometry {
    Geometry { blocks: [count.div_ceil(THREADS), 1, 1], threads: [THREADS as u32, 1], shared: 0 }
}

/// A block for each of `rows` rows of `cols` columns, whose threads take some columns each.
pub(super) fn by_row(rows: usize, cols: usize) -> Geometry {
    let threads = cols.div_ceil(4).next_multiple_of(32).clamp(32, THREADS);
    Geometry { blocks: [rows, 1, 1], threads: [threads as u32, 1], shared: 0 }
}

/// A thread for each of `cols` columns; blocks in y step over `rows` rows.
pub(super) fn by_column(rows: usize, cols: usize) -> Geometry {
    let threads = cols.next_multiple_of(32).clamp(32, THREADS);
    Geometry {
        blocks: [cols.div_ceil(threads), rows.min(ROW_BLOCKS), 1],
        threads: [threads as u32, 1],
        shared: 0,
    }
}

/// The values of a matrix as one type, converted where they are another.
pub(super) enum As<'a, T> {
    Own(&'a Memory<T>),
    Converted(Memory<T>),
}

impl<T> As<'_, T> {
    pub(super) fn memory(&self) -> &Memory<T> {
        match self {
            Self::Own(memory) => memory,
            Self::Converted(memory) => memory,
        }
    }
}

impl Cuda {
    /// The values as f32.
    pub(super) fn widened<'a>(&self, matrix: &'a CudaMatrix) -> Result<As<'a, f32>> {
        const OPERATION: &str = "widen_bf16";
        match &matrix.values {
            Values::F32(values) => Ok(As::Own(values)),
            Values::Bf16(values) => {
                let mut wide = self.gpu.allocate(matrix.len(), OPERATION)?;
                let args = [values.into(), (&mut wide).into(), (matrix.len() as u64).into()];
                self.gpu.launch(KernelFile::Elementwise, OPERATION, each(matrix.len()), &args)?;
                Ok(As::Converted(wide))
            }
        }
    }

    /// The values as bf16.
    pub(super) fn narrowed<'a>(&self, matrix: &'a CudaMatrix) -> Result<As<'a, bf16>> {
        const OPERATION: &str = "narrow_f32";
        match &matrix.values {
            Values::Bf16(values) => Ok(As::Own(values)),
            Values::F32(values) => {
                let mut narrow = self.gpu.allocate(matrix.len(), OPERATION)?;
                let args = [values.into(), (&mut narrow).into(), (matrix.len() as u64).into()];
                self.gpu.launch(KernelFile::Elementwise, OPERATION, each(matrix.len()), &args)?;
                Ok(As::Converted(narrow))
            }
        }
    }

    /// A matrix that feeds products, for a kernel to fill.
    pub(super) fn product_operand(
        &self,
        operation: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<CudaMatrix> {
        Ok(match self.products {
            Products::F32 => {
                CudaMatrix::f32(rows, cols, self.gpu.allocate(rows * cols, operation)?)
            }
            Products::Bf16 => {
                CudaMatrix::bf16(rows, cols, self.gpu.allocate(rows * cols, operation)?)
            }
        })
    }
}

impl Values {
    /// The name of the kernel that writes such values, of one for each type.
    pub(super) fn kernel(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        match self {
            Self::F32(_) => f32,
            Self::Bf16(_) => bf16,
        }
    }
}

impl<'a> From<&'a mut Values> for Arg<'a> {
    fn from(values: &'a mut Values) -> Self {
        match values {
            Values::F32(values) => values.into(),
            Values::Bf16(values) => values.into(),
        }
    }
}

impl<'a> From<&'a Values> for Arg<'a> {
    fn from(values: &'a Values) -> Self {
        match values {
            Values::F32(values) => values.into(),
            Values::Bf16(values) => values.into(),
        }
    }
}

impl Storage for Cuda {
    type Matrix = CudaMatrix;
    type Weight = CudaWeight;
    type Staged = CudaStaged;

    fn describe(&self) -> String {
        format!("{}, {}", self.gpu.describe(), self.products)
    }

    fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<CudaMatrix> {
        const OPERATION: &str = "upload";
        if data.len() != rows * cols {
            let detail = format!("{} values for [{rows}, {cols}]", data.len());
            return Err(shape_error(OPERATION, detail));
        }
        Ok(CudaMatrix::f32(rows, cols, self.gpu.upload(data, OPERATION)?))
    }

    fn stage(&self, values: StoredValues<'_>, rows: usize, cols: usize) -> Result<CudaStaged> {
        pack::stage(self, values, rows, cols)
    }

    fn bring(&self, matrix: &HostMatrix) -> Result<CudaStaged> {
        pack::bring(self, matrix)
    }

    fn receive(&self, staged: &CudaStaged) -> Result<CudaMatrix> {
        pack::receive(self, staged)
    }

    fn download(&self, matrix: &CudaMatrix) -> Result<Vec<f32>> {
        let values = self.widened(matrix)?;
        self.gpu.download(values.memory(), matrix.len(), "download")
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CudaMatrix> {
        Ok(CudaMatrix::f32(rows, cols, self.gpu.zeros(rows * cols, "zeros")?))
    }

    fn duplicate(&self, matrix: &CudaMatrix) -> Result<CudaMatrix> {
        const OPERATION: &str = "duplicate";
        let values = match &matrix.values {
            Values::F32(values) => Values::F32(self.gpu.duplicate(values, OPERATION)?),
            Values::Bf16(values) => Values::Bf16(self.gpu.duplicate(values, OPERATION)?),
        };
        Ok(CudaMatrix { values, ..*matrix })
    }

    fn shape(&self, matrix: &CudaMatrix) -> (usize, usize) {
        (matrix.rows, matrix.cols)
    }

    fn bytes(matrix: &CudaMatrix) -> u64 {
        let size = match &matrix.values {
            Values::F32(_) => size_of::<f32>(),
            Values::Bf16(_) => size_of::<bf16>(),
        };
        (matrix.len() * size) as u64
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        self.gpu.free_memory().map(Some)
    }

    fn offload(&self, matrix: CudaMatrix) -> Result<HostMatrix> {
        self.leave(matrix)?.wait()
    }

    fn leave(&self, matrix: CudaMatrix) -> Result<Fetch<HostMatrix>> {
        const OPERATION: &str = "offload";
        let (rows, cols, len) = (matrix.rows, matrix.cols, matrix.len());
        Ok(match matrix.values {
            Values::F32(values) => self
                .gpu
                .fetch(values, len, OPERATION)?
                .map(move |values| HostMatrix { rows, cols, data: HostData::F32(values) }),
            Values::Bf16(values) => self
                .gpu
                .fetch(values, len, OPERATION)?
                .map(move |values| HostMatrix { rows, cols, data: HostData::Bf16(values) }),
        })
    }

    fn onload(&self, HostMatrix { rows, cols, data }: HostMatrix) -> Result<CudaMatrix> {
        const OPERATION: &str = "onload";
        let values = match &data {
            HostData::F32(values) => Values::F32(self.gpu.upload(values, OPERATION)?),
            HostData::Bf16(values) => Values::Bf16(self.gpu.upload(values, OPERATION)?),
        };
        Ok(CudaMatrix { rows, cols, values })
    }

    fn finish(&self) -> Result<()> {
        self.gpu.finish("finish")
    }

    fn measure_gemm_ceiling(&self) -> Result<f64> {
        super::linear::measure_ceiling(self)
    }
}
