//! Rotary position embeddings.

use super::{
    Cuda, CudaMatrix, Products,
    driver::{Arg, Geometry, KernelFile},
    matrix::shape_error,
};
use crate::backend::{AttentionShape, Result, RopeTables, SequenceLens};

const FILE: KernelFile = KernelFile::Rope;

pub(super) fn rope(
    cuda: &Cuda,
    qkv: &mut CudaMatrix,
    shape: &AttentionShape,
    tables: &RopeTables,
    lens: &SequenceLens,
) -> Result<()> {
    const OPERATION: &str = "rope";
    let (tokens, cols, half_dim) = (lens.tokens(), shape.qkv_cols(), tables.half_dim);
    qkv.expect_shape(OPERATION, tokens, cols)?;
    if half_dim * 2 != shape.head_dim {
        let detail = format!("{half_dim} angles for heads of {}", shape.head_dim);
        return Err(shape_error(OPERATION, detail));
    }
    let positions = tables.cos.len() / half_dim.max(1);
    if lens.longest() > positions || tables.sin.len() != tables.cos.len() {
        let detail = format!("{positions} positions for sequences of {}", lens.longest());
        return Err(shape_error(OPERATION, detail));
    }
    let gpu = &cuda.gpu;
    let positions = cuda.positions.get(lens, || {
        let positions = lens.ranges().flat_map(|range| 0..range.len() as u32);
        gpu.upload(&positions.collect::<Vec<_>>(), OPERATION)
    })?;
    let angles = cuda.rope_tables.get(tables, || {
        Ok((gpu.upload(&tables.cos, OPERATION)?, gpu.upload(&tables.sin, OPERATION)?))
    })?;
    let (cos, sin) = &*angles;
    let rotated = (shape.num_heads + shape.num_kv_heads) as u32;
    let geometry = Geometry { blocks: [tokens, 1, 1], threads: [128, 1], shared: 0 };
    let shared: [Arg<'_>; 6] = [
        (&*positions).into(),
        cos.into(),
        sin.into(),
        (cols as u32).into(),
        rotated.into(),
        (half_dim as u32).into(),
    ];
    match cuda.products {
        Products::F32 => {
            let args = [&[qkv.f32s_mut(OPERATION)?.into()], &shared[..]].concat();
            gpu.launch(FILE, "rope_f32", geometry, &args)
        }
        Products::Bf16 => {
            let mut out = gpu.allocate(tokens * cols, OPERATION)?;
            let own = [qkv.f32s(OPERATION)?.into(), (&mut out).into()];
            let args = [&own, &shared[..]].concat();
            gpu.launch(FILE, "rope_bf16", geometry, &args)?;
            *qkv = CudaMatrix::bf16(tokens, cols, out);
            Ok(())
        }
    }
}
