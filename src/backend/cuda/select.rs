//! Which weights become zero: exact counts.

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Geometry, KernelFile, Memory},
    matrix::{THREADS, by_column, each, shape_error},
};
use crate::backend::{Result, Selection};

const FILE: KernelFile = KernelFile::Select;
/// Digits of a score, each with its shift and its bits.
const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
/// Counts of a histogram.
const BINS: usize = 2048;
/// Groups up to this size are ranked by comparing all pairs.
const PAIRWISE: usize = 32;

/// Zeroes the weights with the lowest `|w| · scale[column]`.
pub(super) fn zero_lowest(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    scale: Option<&CudaMatrix>,
    selection: Selection,
) -> Result<()> {
    const OPERATION: &str = "zero_lowest";
    let (rows, cols) = (w.rows, w.cols);
    if let Some(scale) = scale {
        scale.expect_shape(OPERATION, 1, cols)?;
    }
    if let Selection::Group { m, .. } = selection
        && (m == 0 || !cols.is_multiple_of(m))
    {
        return Err(shape_error(OPERATION, format!("groups of {m} in {cols} columns")));
    }
    let (gpu, count) = (&cuda.gpu, rows * cols);
    let mut scores = gpu.allocate::<u32>(count, OPERATION)?;
    let scale = scale.map(|scale| scale.f32s(OPERATION)).transpose()?;
    let args = [
        w.f32s(OPERATION)?.into(),
        Arg::optional(scale),
        (rows as u64).into(),
        (cols as u64).into(),
        (&mut scores).into(),
    ];
    gpu.launch(FILE, "scores_scaled", by_column(rows, cols), &args)?;
    let marks = match selection {
        Selection::Tensor { zeros } => mark_lowest(cuda, &scores, (rows, cols), zeros)?,
        Selection::Row { zeros } => mark_groups(cuda, &scores, count, cols, zeros)?,
        Selection::Group { zeros, m } => mark_groups(cuda, &scores, count, m, zeros)?,
    };
    let args = [w.f32s_mut(OPERATION)?.into(), (&marks).into(), (count as u64).into()];
    gpu.launch(FILE, "zero_marked", each(count), &args)
}

/// Marks with ones the `zeros` lowest scores of a matrix.
pub(super) fn mark_lowest(
    cuda: &Cuda,
    scores: &Memory<u32>,
    (rows, cols): (usize, usize),
    zeros: usize,
) -> Result<Memory<u8>> {
    const OPERATION: &str = "mark_lowest";
    let (gpu, count) = (&cuda.gpu, rows * cols);
    if let Some(marks) = all_alike(cuda, count, zeros >= count, zeros == 0)? {
        return Ok(marks);
    }
    let mut state = gpu.allocate::<u64>(2, OPERATION)?;
    let thread = Geometry { blocks: [1, 1, 1], threads: [1, 1], shared: 0 };
    gpu.launch(FILE, "first_state", thread, &[(&mut state).into(), (zeros as u64).into()])?;
    let mut counts = gpu.zeros::<u64>(BINS, OPERATION)?;
    let blocks = count.div_ceil(THREADS).min(8 * cuda.processors);
    let wide = Geometry { blocks: [blocks, 1, 1], threads: [THREADS as u32, 1], shared: 0 };
    let one = Geometry { blocks: [1, 1, 1], threads: [1024, 1], shared: 0 };
    for (shift, bits) in DIGITS {
        let args = [
            scores.into(),
            (count as u64).into(),
            (&state).into(),
            shift.into(),
            bits.into(),
            (&mut counts).into(),
        ];
        gpu.launch(FILE, "histogram", wide, &args)?;
        let args = [(&mut counts).into(), (&mut state).into(), shift.into()];
        gpu.launch(FILE, "next_digit", one, &args)?;
    }
    let warps = THREADS / 32;
    let by_row = Geometry { blocks: [rows.div_ceil(warps), 1, 1], ..wide };
    let mut ties = gpu.allocate::<u32>(rows, OPERATION)?;
    let shape = [(rows as u64).into(), (cols as u64).into()];
    let args = [scores.into(), shape[0], shape[1], (&state).into(), (&mut ties).into()];
    gpu.launch(FILE, "count_ties", by_row, &args)?;
    let args = [(&mut ties).into(), shape[0], (&state).into()];
    gpu.launch(FILE, "share_ties", one, &args)?;
    let mut marks = gpu.allocate::<u8>(count, OPERATION)?;
    let args =
        [scores.into(), shape[0], shape[1], (&state).into(), (&ties).into(), (&mut marks).into()];
    gpu.launch(FILE, "mark_lowest", by_row, &args)?;
    Ok(marks)
}

/// Marks with ones the `zeros` lowest of every `m` consecutive scores.
pub(super) fn mark_groups(
    cuda: &Cuda,
    scores: &Memory<u32>,
    count: usize,
    m: usize,
    zeros: usize,
) -> Result<Memory<u8>> {
    const OPERATION: &str = "mark_groups";
    if let Some(marks) = all_alike(cuda, count, zeros >= m, zeros == 0)? {
        return Ok(marks);
    }
    let mut marks = cuda.gpu.allocate::<u8>(count, OPERATION)?;
    if m <= PAIRWISE {
        let args = [
            scores.into(),
            (count as u64).into(),
            (m as u32).into(),
            (zeros as u32).into(),
            (&mut marks).into(),
        ];
        cuda.gpu.launch(FILE, "lowest_of_groups", each(count), &args)?;
    } else {
        let geometry = Geometry { blocks: [count / m, 1, 1], threads: [256, 1], shared: 0 };
        let args = [scores.into(), (m as u64).into(), (zeros as u32).into(), (&mut marks).into()];
        cuda.gpu.launch(FILE, "lowest_of_rows", geometry, &args)?;
    }
    Ok(marks)
}

/// The marks where all or none are to be set.
fn all_alike(cuda: &Cuda, count: usize, all: bool, none: bool) -> Result<Option<Memory<u8>>> {
    const OPERATION: &str = "marks";
    match (all, none) {
        (_, true) => cuda.gpu.zeros(count, OPERATION).map(Some),
        (true, false) => {
            let mut marks = cuda.gpu.allocate::<u8>(count, OPERATION)?;
            let args = [(&mut marks).into(), (count as u64).into()];
            cuda.gpu.launch(FILE, "mark_all", each(count), &args)?;
            Ok(Some(marks))
        }
        (false, false) => Ok(None),
    }
}
