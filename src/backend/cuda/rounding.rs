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
    Fetch, Grid, Result, Rounding, Scales,
    grid::{F8_MAX, Outline, int_range},
};

/// What memory is for, in errors.
const SCALES: &str = "scales";
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

/// Codes and scales, for the host.
pub(super) fn fetch_rounding(cuda: &Cuda, rounding: CudaRounding) -> Result<Fetch<Rounding>> {
    let CudaRounding { outline: Outline { grid, rows, cols, .. }, codes, scales, .. } = rounding;
    let codes = cuda.gpu.fetch(codes, rows * cols, "codes")?;
    let scales = scales.fetch(&cuda.gpu, rows)?;
    Ok(Fetch::new(move || Ok(Rounding::known(grid, cols, codes.wait()?, scales.wait()?))))
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
        let group_len = grid.group(cols);
        let groups = cols / group_len;
        let len = rows * groups;
        let point = match grid {
            Grid::Int { grid, .. } if !grid.symmetric => Some(gpu.zeros(len, SCALES)?),
            _ => None,
        };
        let (min, blocks) = match grid {
            Grid::Block { grid: block @ BlockGrid { scales: Some(_), .. }, .. } => {
                let blocks = rows * cols / block.block_len;
                let of_mins = |len: usize| if block.mins.is_some() { len } else { 0 };
                let blocks = DeviceBlocks {
                    d: gpu.zeros(blocks, SCALES)?,
                    dmin: gpu.zeros(of_mins(blocks), SCALES)?,
                    scales: gpu.zeros(len, SCALES)?,
                    mins: gpu.zeros(of_mins(len), SCALES)?,
                };
                let min = block.mins.map(|_| gpu.zeros(len, SCALES)).transpose()?;
                (min, Some(blocks))
            }
            _ => (None, None),
        };
        let scale = gpu.zeros(len, SCALES)?;
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

    fn fetch(self, gpu: &Gpu, rows: usize) -> Result<Fetch<Scales>> {
        let len = rows * self.groups;
        let scales = gpu.fetch::<f32, f32>(self.scale, len, SCALES)?;
        let Grid::Block { grid, .. } = self.grid else {
            let points = self.point.map(|points| gpu.fetch(points, len, SCALES)).transpose()?;
            return Ok(Fetch::new(move || {
                let zero_points = points.map_or_else(|| Ok(vec![0; len]), Fetch::wait)?;
                Ok(Scales::Groups { scales: scales.wait()?, zero_points })
            }));
        };
        if let Some(blocks) = self.blocks {
            return blocks.fetch(gpu, len, grid);
        }
        let block = |d| BlockScales { d, scales: [1; MAX_GROUPS], ..BlockScales::default() };
        Ok(scales.map(move |scales| {
            Scales::Blocks(scales.into_iter().map(f16::from_f32).map(block).collect())
        }))
    }
}

impl DeviceBlocks {
    /// The scales of so many groups.
    fn fetch(self, gpu: &Gpu, groups: usize, grid: BlockGrid) -> Result<Fetch<Scales>> {
        let of_block = grid.groups();
        let blocks = groups / of_block;
        let d = gpu.fetch::<f32, f32>(self.d, blocks, SCALES)?;
        let scales = gpu.fetch::<i8, i8>(self.scales, groups, SCALES)?;
        let minima = match grid.mins {
            Some(_) => {
                let mins = gpu.fetch::<i8, i8>(self.mins, groups, SCALES)?;
                Some((gpu.fetch::<f32, f32>(self.dmin, blocks, SCALES)?, mins))
            }
            None => None,
        };
        Ok(Fetch::new(move || {
            let (d, scales) = (d.wait()?, scales.wait()?);
            let (dmin, mins) = match minima {
                Some((dmin, mins)) => (dmin.wait()?, mins.wait()?),
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
            Ok(Scales::Blocks(found.collect()))
        }))
    }
}
