//! Causal attention.

use super::{
    Cuda, CudaMatrix, Products,
    driver::{Geometry, KernelFile},
    matrix::{Values, shape_error},
};
use crate::backend::{AttentionShape, Result, SequenceLens};

/// A kernel for heads of up to so many columns: queries of a tile, dynamic shared memory in bytes. As the
/// kernels' texts say.
struct Kernel {
    dims: usize,
    name: &'static str,
    queries: usize,
    shared: usize,
}

const fn kernel(dims: usize, name: &'static str, queries: usize, shared: usize) -> Kernel {
    Kernel { dims, name, queries, shared }
}

const BF16: [Kernel; 8] = [
    kernel(16, "attention_bf16_16", 128, 10_240),
    kernel(32, "attention_bf16_32", 128, 22_528),
    kernel(64, "attention_bf16_64", 128, 38_912),
    kernel(80, "attention_bf16_80", 64, 43_008),
    kernel(96, "attention_bf16_96", 64, 55_296),
    kernel(128, "attention_bf16_128", 64, 71_680),
    kernel(192, "attention_bf16_192", 64, 52_224),
    kernel(256, "attention_bf16_256", 64, 68_608),
];

const F32: [Kernel; 8] = [
    kernel(16, "attention_f32_16", 64, 31_744),
    kernel(32, "attention_f32_32", 64, 44_032),
    kernel(64, "attention_f32_64", 64, 68_608),
    kernel(80, "attention_f32_80", 64, 51_712),
    kernel(96, "attention_f32_96", 64, 59_904),
    kernel(128, "attention_f32_128", 64, 76_288),
    kernel(192, "attention_f32_192", 32, 79_360),
    kernel(256, "attention_f32_256", 32, 68_864),
];

const OPERATION: &str = "causal_attention";

/// File, kernel and threads of a block for heads of so many columns.
fn choose(products: Products, head_dim: usize) -> Result<(KernelFile, &'static Kernel, u32)> {
    let (file, kernels, threads) = match products {
        Products::F32 => (KernelFile::AttentionF32, &F32, 256),
        Products::Bf16 => (KernelFile::AttentionBf16, &BF16, 128),
    };
    if let Some(kernel) = kernels.iter().find(|kernel| head_dim <= kernel.dims) {
        return Ok((file, kernel, threads));
    }
    let most = kernels.iter().map(|kernel| kernel.dims).max().unwrap_or(0);
    let detail = format!(
        "heads of {head_dim} columns; the GPU's kernels have at most {most}, --device cpu has no limit"
    );
    Err(shape_error(OPERATION, detail))
}

pub(super) fn check(cuda: &Cuda, shape: &AttentionShape) -> Result<()> {
    choose(cuda.products, shape.head_dim).map(|_| ())
}

pub(super) fn causal_attention(
    cuda: &Cuda,
    qkv: &CudaMatrix,
    shape: &AttentionShape,
    lens: &SequenceLens,
) -> Result<CudaMatrix> {
    let (tokens, head_dim) = (lens.tokens(), shape.head_dim);
    qkv.expect_shape(OPERATION, tokens, shape.qkv_cols())?;
    let (file, kernel, threads) = choose(cuda.products, head_dim)?;
    let mut out = cuda.product_operand(OPERATION, tokens, shape.num_heads * head_dim)?;
    let key = (lens.clone(), kernel.queries);
    let tiles =
        cuda.tiles.get(&key, || cuda.gpu.upload(&tiles(lens, kernel.queries), OPERATION))?;
    let blocks = [tiles.len() / 3 * shape.num_heads, 1, 1];
    let geometry = Geometry { blocks, threads: [threads, 1], shared: kernel.shared };
    let launch = |qkv, out: &mut CudaMatrix| {
        let args = [
            qkv,
            (&mut out.values).into(),
            (&*tiles).into(),
            (shape.num_heads as u32).into(),
            (shape.num_kv_heads as u32).into(),
            (head_dim as u32).into(),
            shape.scale.into(),
        ];
        cuda.gpu.launch(file, kernel.name, geometry, &args)
    };
    match &out.values {
        Values::F32(_) => launch(cuda.widened(qkv)?.memory().into(), &mut out)?,
        Values::Bf16(_) => launch(cuda.narrowed(qkv)?.memory().into(), &mut out)?,
    }
    Ok(out)
}

/// Blocks of queries, those with the most keys first: row of the sequence's first token, position of the
/// first query in the sequence, length of the sequence.
fn tiles(lens: &SequenceLens, queries: usize) -> Vec<u32> {
    let mut tiles: Vec<[u32; 3]> = lens
        .ranges()
        .flat_map(|range| {
            let (start, len) = (range.start as u32, range.len());
            (0..len).step_by(queries).map(move |first| [start, first as u32, len as u32])
        })
        .collect();
    tiles.sort_by_key(|[_, first, _]| std::cmp::Reverse(*first));
    tiles.concat()
}
