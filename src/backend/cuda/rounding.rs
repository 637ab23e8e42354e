//! Matrices that are being rounded: codes and scales in device memory, and rounding to the nearest value.

use half::f16;
use sparsepack_formats::{
    DType,
    encoding::ggml::{BlockGrid, BlockScales, MAX_GROUPS},
};

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Gpu, KernelFile, Memory},
    matrix::by_column,
    solve::order_of,
};
use crate::backend::{
    Grid, Result, Rounding, Scales,
    grid::{F8_MAX, Outline, int_range},
};

/// Names of grids and types in the kernels.
const NOTHING: u32 = 0;
const LEVELS: u32 = 1;
const FLOAT8: u32 = 2;
const AS_F32: u32 = 0;
pub(super) const AS_BF16: u32 = 1;
pub(super) const AS_F16: u32 = 2;

/// The codes and scales of a matrix as far as they are known, in device memory until the host asks for
/// them.
#[derive(Debug)]
pub struct CudaRounding {
    pub(super) outline: Outline,
    /// `[rows, cols]`.
    pub(super) codes: Memory<i8>,
    pub(super) scales: DeviceScales,
    /// The matrix's column at each position of the sweep.
    pub(super) order: Option<Memory<u32>>,
    /// What searches for scales try.
    pub(super) candidates: Memory<f32>,
}

/// The scales of every group, `[rows, groups]` each.
#[derive(Debug)]
pub(super) struct DeviceScales {
    pub(super) grid: Grid,
    pub(super) groups: usize,
    group_len: usize,
    pub(super) scale: Memory<f32>,
    /// Zero points, where the grid has some.
    pub(super) point: Option<Memory<i8>>,
    /// Where the grid has some.
    pub(super) min: Option<Memory<f32>>,
    /// Where scales have scales.
    pub(super) blocks: Option<DeviceBlocks>,
}

/// What scales and minima are made of, and the integers.
#[derive(Debug)]
pub(super) struct DeviceBlocks {
    /// `[rows, blocks]`, as binary16 holds them.
    pub(super) d: Memory<f32>,
    /// Likewise; nothing where the grid has no minima.
    pub(super) dmin: Memory<f32>,
    /// `[rows, groups]`.
    pub(super) scales: Memory<i8>,
    /// Likewise; nothing where the grid has no minima.
    pub(super) mins: Memory<i8>,
}

/// Nothing known yet of a matrix.
pub(super) fn rounding(cuda: &Cuda, grid: Grid, rows: usize, cols: usize) -> Result<CudaRounding> {
    const OPERATION: &str = "rounding";
    let outline = Outline::new(grid, rows, cols)?;
    Ok(CudaRounding {
        outline,
        codes: cuda.gpu.zeros(rows * cols, OPERATION)?,
        scales: DeviceScales::new(&cuda.gpu, outline)?,
        order: None,
        candidates: cuda.gpu.upload(&grid.candidates(), OPERATION)?,
    })
}

/// The weights that are swept have the columns in this order.
pub(super) fn set_order(cuda: &Cuda, rounding: &mut CudaRounding, order: &[usize]) -> Result<()> {
    const OPERATION: &str = "set_order";
    let order = order_of(OPERATION, order, rounding.outline.cols)?;
    rounding.order = Some(cuda.gpu.upload(&order, OPERATION)?);
    rounding.outline.ordered = true;
    Ok(())
}

/// Codes and scales, on the host.
pub(super) fn host_rounding(cuda: &Cuda, rounding: &CudaRounding) -> Result<Rounding> {
    let CudaRounding { outline, codes, scales, .. } = rounding;
    let codes = cuda.gpu.download(codes, outline.rows * outline.cols, "codes")?;
    let scales = scales.download(&cuda.gpu, outline.rows)?;
    Ok(Rounding::known(outline.grid, outline.cols, codes, scales))
}

/// Rounds every weight to the nearest value.
pub(super) fn round(cuda: &Cuda, w: &mut CudaMatrix, rounding: &mut CudaRounding) -> Result<()> {
    const OPERATION: &str = "round_weights";
    let (rows, cols) = (w.rows, w.cols);
    rounding.outline.expect_shape(OPERATION, rows, cols)?;
    let own = [w.f32s_mut(OPERATION)?.into(), (rows as u64).into(), (cols as u64).into()];
    let args = [&own[..], &rounding.scales.args(), &[(&mut rounding.codes).into()]].concat();
    cuda.gpu.launch(KernelFile::Sweep, OPERATION, by_column(rows, cols), &args)
}

impl DeviceScales {
    fn new(gpu: &Gpu, Outline { grid, rows, cols, .. }: Outline) -> Result<Self> {
        const OPERATION: &str = "scales";
        let group_len = grid.group(cols);
        let groups = cols / group_len;
        let len = rows * groups;
        let point = match grid {
            Grid::Int { grid, .. } if !grid.symmetric => Some(gpu.zeros(len, OPERATION)?),
            _ => None,
        };
        let (min, blocks) = match grid {
            Grid::Block { grid: block @ BlockGrid { scales: Some(_), .. }, .. } => {
                let blocks = rows * cols / block.block_len;
                let of_mins = |len: usize| if block.mins.is_some() { len } else { 0 };
                let blocks = DeviceBlocks {
                    d: gpu.zeros(blocks, OPERATION)?,
                    dmin: gpu.zeros(of_mins(blocks), OPERATION)?,
                    scales: gpu.zeros(len, OPERATION)?,
                    mins: gpu.zeros(of_mins(len), OPERATION)?,
                };
                let min = block.mins.map(|_| gpu.zeros(len, OPERATION)).transpose()?;
                (min, Some(blocks))
            }
            _ => (None, None),
        };
        let scale = gpu.zeros(len, OPERATION)?;
        Ok(Self { grid, groups, group_len, scale, point, min, blocks })
    }

    /// The type that scales of their own, or decoded values, are stored in.
    pub(super) fn stored(&self) -> u32 {
        let dtype = match self.grid {
            Grid::Int { grid, .. } => grid.scale,
            Grid::F8E4m3 { scale } => scale,
            Grid::Block { .. } => DType::F32,
        };
        match dtype {
            DType::Bf16 => AS_BF16,
            DType::F16 => AS_F16,
            _ => AS_F32,
        }
    }

    /// The arguments that every kernel takes that rounds.
    pub(super) fn args(&self) -> [Arg<'_>; 9] {
        let (kind, low, high) = match self.grid {
            Grid::Int { grid, .. } => {
                let (low, high) = int_range(grid);
                (LEVELS, low, high)
            }
            Grid::F8E4m3 { .. } => (FLOAT8, -F8_MAX, F8_MAX),
            Grid::Block { grid, .. } => (LEVELS, f32::from(grid.low), f32::from(grid.high)),
        };
        [
            kind.into(),
            self.stored().into(),
            low.into(),
            high.into(),
            (&self.scale).into(),
            Arg::optional(self.point.as_ref()),
            Arg::optional(self.min.as_ref()),
            (self.groups as u64).into(),
            (self.group_len as u32).into(),
        ]
    }

    /// The same where nothing is rounded.
    pub(super) fn no_args() -> [Arg<'static>; 9] {
        [
            NOTHING.into(),
            AS_F32.into(),
            0.0f32.into(),
            0.0f32.into(),
            Arg::optional::<f32>(None),
            Arg::optional::<i8>(None),
            Arg::optional::<f32>(None),
            0u64.into(),
            0u32.into(),
        ]
    }

    fn download(&self, gpu: &Gpu, rows: usize) -> Result<Scales> {
        const OPERATION: &str = "scales";
        let len = rows * self.groups;
        let Grid::Block { grid, .. } = self.grid else {
            let zero_points = match &self.point {
                Some(points) => gpu.download(points, len, OPERATION)?,
                None => vec![0; len],
            };
            let scales = gpu.download(&self.scale, len, OPERATION)?;
            return Ok(Scales::Groups { scales, zero_points });
        };
        let Some(blocks) = &self.blocks else {
            let scales = gpu.download(&self.scale, len, OPERATION)?;
            let block = |d| BlockScales { d, scales: [1; MAX_GROUPS], ..BlockScales::default() };
            return Ok(Scales::Blocks(scales.into_iter().map(f16::from_f32).map(block).collect()));
        };
        blocks.download(gpu, len, grid).map(Scales::Blocks)
    }
}

impl DeviceBlocks {
    /// The scales of so many groups.
    fn download(&self, gpu: &Gpu, groups: usize, grid: BlockGrid) -> Result<Vec<BlockScales>> {
        const OPERATION: &str = "scales";
        let of_block = grid.groups();
        let blocks = groups / of_block;
        let (d, scales) = (
            gpu.download(&self.d, blocks, OPERATION)?,
            gpu.download(&self.scales, groups, OPERATION)?,
        );
        let (dmin, mins) = match grid.mins {
            Some(_) => {
                let mins = gpu.download(&self.mins, groups, OPERATION)?;
                (gpu.download(&self.dmin, blocks, OPERATION)?, mins)
            }
            None => (vec![0.0; blocks], vec![0; groups]),
        };
        let ofs = scales.chunks_exact(of_block).zip(mins.chunks_exact(of_block));
        let found = d.iter().zip(&dmin).zip(ofs).map(|((d, dmin), (scales, mins))| {
            let (d, dmin) = (f16::from_f32(*d), f16::from_f32(*dmin));
            let mut block = BlockScales { d, dmin, ..BlockScales::default() };
            block.scales[..of_block].copy_from_slice(scales);
            block.mins[..of_block].copy_from_slice(mins);
            block
        });
        Ok(found.collect())
    }
}
