//! Weights as files have them: on their way to the device, rounded to what is stored, packed, and on their
//! way back.

use half::bf16;
use sparsepack_formats::{DType, encoding::dense};

use super::{
    Cuda, CudaMatrix,
    driver::{Arriving, Bytes, KernelFile, Memory, Named},
    matrix::{by_column, each, shape_error},
    rounding::{AS_BF16, AS_F16},
};
use crate::backend::{
    Fetch, HostData, HostMatrix, PackOps, Result, Storage, StoredValues,
    cpu::{CpuMatrix, too_large},
};

const FILE: KernelFile = KernelFile::Pack;

/// Values of a matrix on their way to the device, in the type that they are stored in.
#[derive(Debug)]
pub struct CudaStaged {
    rows: usize,
    cols: usize,
    values: StagedValues,
}

#[derive(Debug)]
enum StagedValues {
    Half(Arriving<u16>, u32),
    Single(Arriving<f32>),
    /// Stays as it is.
    Product(Arriving<bf16>),
    /// Nothing to send.
    None,
}

/// Stored values on the device.
enum Rounded {
    Half(Memory<u16>),
    Single(Memory<f32>),
}

/// The kernels' name of a 16-bit type.
fn half(dtype: DType) -> Option<u32> {
    match dtype {
        DType::Bf16 => Some(AS_BF16),
        DType::F16 => Some(AS_F16),
        _ => None,
    }
}

/// Begins to bring values to the device.
pub(super) fn stage(
    cuda: &Cuda,
    values: StoredValues<'_>,
    rows: usize,
    cols: usize,
) -> Result<CudaStaged> {
    const OPERATION: &str = "stage";
    values.check(OPERATION, rows, cols)?;
    let StoredValues { dtype, bytes } = values;
    let gpu = &cuda.gpu;
    let values = match (half(dtype), dtype) {
        _ if bytes.is_empty() => StagedValues::None,
        (Some(kind), _) => StagedValues::Half(gpu.send(bytes, OPERATION)?, kind),
        (None, DType::F32) => StagedValues::Single(gpu.send(bytes, OPERATION)?),
        (None, _) => {
            let mut wide = vec![0.0f32; rows * cols];
            dense::to_f32(dtype, bytes, &mut wide);
            StagedValues::Single(gpu.send(bytemuck::cast_slice(&wide), OPERATION)?)
        }
    };
    Ok(CudaStaged { rows, cols, values })
}

/// Begins to bring a matrix to the device, its element type unchanged.
pub(super) fn bring(cuda: &Cuda, matrix: &HostMatrix) -> Result<CudaStaged> {
    const OPERATION: &str = "bring";
    let &HostMatrix { rows, cols, ref data } = matrix;
    let dtype = match data {
        HostData::F32(_) => DType::F32,
        HostData::Bf16(_) => DType::Bf16,
    };
    let bytes: &[u8] = match data {
        HostData::F32(values) => bytemuck::cast_slice(values),
        HostData::Bf16(values) => bytemuck::cast_slice(values),
    };
    StoredValues { dtype, bytes }.check(OPERATION, rows, cols)?;
    let values = match data {
        _ if bytes.is_empty() => StagedValues::None,
        HostData::F32(_) => StagedValues::Single(cuda.gpu.send(bytes, OPERATION)?),
        HostData::Bf16(_) => StagedValues::Product(cuda.gpu.send(bytes, OPERATION)?),
    };
    Ok(CudaStaged { rows, cols, values })
}

/// What was staged, as f32, or brought.
pub(super) fn receive(cuda: &Cuda, staged: &CudaStaged) -> Result<CudaMatrix> {
    const OPERATION: &str = "widen_stored";
    let gpu = &cuda.gpu;
    let &CudaStaged { rows, cols, ref values } = staged;
    let values = match values {
        StagedValues::None => return cuda.zeros(rows, cols),
        StagedValues::Product(values) => {
            let values = gpu.duplicate(gpu.arrived(values, OPERATION)?, OPERATION)?;
            return Ok(CudaMatrix::bf16(rows, cols, values));
        }
        StagedValues::Single(values) => {
            gpu.duplicate(gpu.arrived(values, OPERATION)?, OPERATION)?
        }
        StagedValues::Half(values, kind) => {
            let from = gpu.arrived(values, OPERATION)?;
            let mut wide = gpu.allocate(rows * cols, OPERATION)?;
            let args =
                [from.into(), (&mut wide).into(), ((rows * cols) as u64).into(), (*kind).into()];
            gpu.launch(FILE, OPERATION, each(rows * cols), &args)?;
            wide
        }
    };
    Ok(CudaMatrix::f32(rows, cols, values))
}

/// Rounds the values of `w` to what `dtype` holds.
pub(super) fn store(cuda: &Cuda, w: &mut CudaMatrix, dtype: DType) -> Result<Fetch<Vec<u8>>> {
    const OPERATION: &str = "store";
    if w.len() == 0 {
        return Ok(Fetch::ready(Vec::new()));
    }
    match rounded(cuda, w, dtype)? {
        Some(Rounded::Half(values)) => cuda.gpu.fetch(values, w.len(), OPERATION),
        Some(Rounded::Single(values)) => cuda.gpu.fetch(values, w.len(), OPERATION),
        None => on_host(cuda, w, |host| cuda.host.store(host, dtype)),
    }
}

/// As [`store`], in the 2:4 packing.
pub(super) fn pack_24(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    dtype: DType,
) -> Result<Option<[Fetch<Vec<u8>>; 2]>> {
    const OPERATION: &str = "pack_24";
    let (rows, cols) = (w.rows, w.cols);
    if !cols.is_multiple_of(4) {
        return Err(shape_error(OPERATION, format!("{cols} columns, not whole groups of 4")));
    }
    if w.len() == 0 {
        return Ok(Some([Vec::new(), Vec::new()].map(Fetch::ready)));
    }
    match rounded(cuda, w, dtype)? {
        Some(Rounded::Half(dense)) => packed(cuda, "pack_24_half", &dense, rows, cols),
        Some(Rounded::Single(dense)) => packed(cuda, "pack_24_single", &dense, rows, cols),
        None => on_host(cuda, w, |host| cuda.host.pack_24(host, dtype)),
    }
}

/// Packs by `kernel`, which takes elements of this type.
fn packed<T: Bytes + Named>(
    cuda: &Cuda,
    kernel: &'static str,
    dense: &Memory<T>,
    rows: usize,
    cols: usize,
) -> Result<Option<[Fetch<Vec<u8>>; 2]>> {
    let gpu = &cuda.gpu;
    let width = cols.div_ceil(8);
    let mut values = gpu.allocate::<T>(rows * cols / 2, kernel)?;
    let mut metadata = gpu.allocate::<u8>(rows * width, kernel)?;
    let mut full = gpu.zeros::<u32>(1, kernel)?;
    let args = [
        dense.into(),
        (rows as u64).into(),
        (cols as u64).into(),
        (&mut values).into(),
        (&mut metadata).into(),
        (&mut full).into(),
    ];
    gpu.launch(FILE, kernel, by_column(rows, width), &args)?;
    if gpu.download(&full, 1, kernel)? != [0] {
        return Ok(None);
    }
    let values = gpu.fetch(values, rows * cols / 2, kernel)?;
    Ok(Some([values, gpu.fetch(metadata, rows * width, kernel)?]))
}

/// What `dtype` holds of the values of `w`, which become that too; `None` for a type that kernels do not
/// have.
fn rounded(cuda: &Cuda, w: &mut CudaMatrix, dtype: DType) -> Result<Option<Rounded>> {
    const OPERATION: &str = "round_to_half";
    let gpu = &cuda.gpu;
    let count = w.len();
    let Some(kind) = half(dtype) else {
        return match dtype {
            DType::F32 => {
                gpu.duplicate(w.f32s(OPERATION)?, OPERATION).map(|w| Some(Rounded::Single(w)))
            }
            _ => Ok(None),
        };
    };
    let mut stored = gpu.allocate::<u16>(count, OPERATION)?;
    let mut beyond = gpu.zeros::<u32>(1, OPERATION)?;
    let args = [
        w.f32s_mut(OPERATION)?.into(),
        (&mut stored).into(),
        (count as u64).into(),
        kind.into(),
        (&mut beyond).into(),
    ];
    gpu.launch(FILE, OPERATION, each(count), &args)?;
    if gpu.download(&beyond, 1, OPERATION)? != [0] {
        // Such values were left as they are.
        return Err(too_large(&cuda.download(w)?, dtype));
    }
    Ok(Some(Rounded::Half(stored)))
}

/// Does `work` on the host.
fn on_host<T>(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    work: impl FnOnce(&mut CpuMatrix) -> Result<T>,
) -> Result<T> {
    let (rows, cols) = (w.rows, w.cols);
    let mut host = cuda.host.upload(&cuda.download(w)?, rows, cols)?;
    let done = work(&mut host)?;
    *w = cuda.upload(&cuda.host.download(&host)?, rows, cols)?;
    Ok(done)
}
