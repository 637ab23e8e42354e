//! bf16 × bf16 products with f32 sums on instructions made for them.
//!
//! Two instruction sets, Intel AMX and AVX512-BF16, work on one packed layout (see [`pack`]), so
//! they differ in one function only: the 32 × 32 block product of a strip of `A` and a panel of
//! `B`. Every unsafe block of the backend is in this folder.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod pack;

use std::cell::Cell;
use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

use super::simd::vectorised;

/// Rows of a strip of `A`, columns of a panel of `B`.
pub(super) const BLOCK: usize = 32;
/// Inner indices of a tile.
pub(super) const TILE_K: usize = 32;
/// Lines of a strip or panel per tile of the inner dimension.
pub(super) const TILE_LINES: usize = 32;

/// 16 pairs of bf16: a row of a tile, one cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u32; 16]);

impl Line {
    /// A line of zeros.
    pub(super) const ZERO: Self = Self([0; 16]);
}

/// A 32 × 32 block of sums, row-major.
#[derive(Debug, Clone, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [f32; BLOCK * BLOCK]);

impl Sums {
    /// All zero.
    pub(super) const ZERO: Self = Self([0.0; BLOCK * BLOCK]);
}

/// Instructions for bf16 products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    /// Intel AMX tiles.
    Amx,
    /// AVX512-BF16 dot products.
    Avx512,
}

impl Isa {
    /// Every instruction set this processor and system offer, best first.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        [Self::Amx, Self::Avx512].into_iter().filter(|isa| isa.is_available())
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        avx512::is_available() && (self == Self::Avx512 || amx::is_available())
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        false
    }
}

thread_local! {
    /// Whether this thread's tile registers are configured.
    static IN_SESSION: Cell<bool> = const { Cell::new(false) };
}

/// The right to compute blocks on this thread: tile registers are configured as long as it lives.
pub(super) struct Session {
    isa: Isa,
    /// Registers belong to a thread.
    _thread: PhantomData<*const ()>,
}

impl Session {
    /// Prepares this thread.
    ///
    /// # Panics
    /// When the instruction set is not available, or a session is open on this thread.
    pub(super) fn start(isa: Isa) -> Self {
        assert!(isa.is_available(), "{isa:?} is not available");
        assert!(!IN_SESSION.replace(true), "a thread has one set of tile registers");
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            // SAFETY: AMX is available.
            unsafe { amx::configure() };
        }
        Self { isa, _thread: PhantomData }
    }

    /// `sums = a b` for one strip and one panel of equal inner length.
    ///
    /// # Panics
    /// When the lengths differ or are no whole tiles.
    pub(super) fn block(&self, a: &[Line], b: &[Line], sums: &mut Sums) {
        assert!(a.len() == b.len() && a.len().is_multiple_of(TILE_LINES), "unequal tiles");
        #[cfg(target_arch = "x86_64")]
        match self.isa {
            // SAFETY: AMX is available, the session configured the tiles, and both operands hold
            // the same number of whole tiles.
            Isa::Amx => unsafe { amx::block(a, b, sums.0.as_mut_ptr(), BLOCK, false) },
            // SAFETY: AVX512-BF16 is available.
            Isa::Avx512 => unsafe { avx512::block(a, b, sums) },
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("{sums:p}: no session starts without instructions");
    }

    /// Packs `e^(factor · (x − shift))` as row `row` of a strip of `A` and returns the sum before
    /// rounding; `x` has the inner length of the strip, and no value is above `shift`. Denormal
    /// results count as 0 in products.
    #[allow(clippy::unused_self, reason = "a session proves that the instructions exist")]
    pub(super) fn exp_row(
        &self,
        x: &[f32],
        shift: f32,
        factor: f32,
        row: usize,
        strip: &mut [Line],
    ) -> f32 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every instruction set for bf16 products comes with AVX512-BF16.
        unsafe {
            avx512::exp_row(x, shift, factor, row, strip)
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!(
            "{x:p} {shift} {factor} {row} {strip:p}: no session starts without instructions"
        );
    }

    /// Computes the block of `out` at `a`'s rows and `b`'s columns: `out = a b`, or `out += a b`.
    /// `out` starts at the block; `rows × cols` of it exist, rows `stride` values apart.
    ///
    /// # Panics
    /// As [`block`](Self::block); when `out` is too short.
    pub(super) fn block_into(&self, a: &[Line], b: &[Line], out: Target<'_>, sums: &mut Sums) {
        let Target { out, stride, rows, cols, add } = out;
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx && rows >= BLOCK && cols >= BLOCK {
            assert!(a.len() == b.len() && a.len().is_multiple_of(TILE_LINES), "unequal tiles");
            assert!(out.len() >= (BLOCK - 1) * stride + BLOCK, "a block beyond the result");
            // SAFETY: AMX is available, the session configured the tiles, both operands hold the
            // same number of whole tiles, and the whole block lies in `out`.
            unsafe { amx::block(a, b, out.as_mut_ptr(), stride, add) };
            return;
        }
        self.block(a, b, sums);
        let (rows, cols) = (rows.min(BLOCK), cols.min(BLOCK));
        let end = rows.saturating_sub(1) * stride + cols;
        let out = &mut out[..end];
        if !add {
            out.chunks_mut(stride).for_each(|out| out[..cols].fill(0.0));
        }
        add_block(sums, out, stride, cols);
    }
}

/// Where a block product goes.
pub(super) struct Target<'a> {
    /// The result from the block's first element on.
    pub(super) out: &'a mut [f32],
    /// Values from one row to the next.
    pub(super) stride: usize,
    /// Rows from here to the end of the result.
    pub(super) rows: usize,
    /// Columns from here to the end of the result.
    pub(super) cols: usize,
    /// Whether the product is added to what is there.
    pub(super) add: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx {
            // SAFETY: AMX is available.
            unsafe { amx::release() };
        }
        IN_SESSION.set(false);
    }
}

/// Transposes each 16 × 16 tile of pairs in place.
fn transpose_tiles(lines: &mut [Line]) {
    let (tiles, _) = lines.as_chunks_mut::<16>();
    #[cfg(target_arch = "x86_64")]
    if avx512::is_available() {
        // SAFETY: AVX-512 is available.
        tiles.iter_mut().for_each(|tile| unsafe { avx512::transpose(tile) });
        return;
    }
    for tile in tiles {
        let source = *tile;
        for (i, line) in tile.iter_mut().enumerate() {
            line.0 = std::array::from_fn(|j| source[j].0[i]);
        }
    }
}

vectorised! {
    /// `out += sums` for the `cols` first columns of as many rows as `out` has, `stride` values
    /// apart.
    fn add_block<'a>(sums: &'a Sums, out: &'a mut [f32], stride: usize, cols: usize) {
        let (rows, _) = sums.0.as_chunks::<BLOCK>();
        for (sums, out) in rows.iter().zip(out.chunks_mut(stride)) {
            for (out, sum) in out[..cols].iter_mut().zip(sums) {
                *out += sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{BLOCK, Isa, Line, Session, Sums, pack};

    fn operand(seed: u32, rows: usize, k: usize) -> Vec<bf16> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 8) as f32 / 8_388_608.0 - 1.0)
        };
        (0..rows * k).map(|_| next()).collect()
    }

    #[test]
    #[allow(clippy::print_stdout, reason = "a skipped test says so")]
    fn every_instruction_set_gives_the_same_block() {
        for k in [1usize, 2, 31, 32, 33, 64, 200] {
            let tiles = k.div_ceil(32);
            let (a, b) = (operand(1, BLOCK, k), operand(2, BLOCK, k));
            let mut a_lines = vec![Line::ZERO; tiles * 32];
            let mut b_lines = vec![Line::ZERO; tiles * 32];
            pack::rows(pack::Source::dense(&a, BLOCK, k), &mut a_lines);
            pack::columns_from_rows(pack::Source::dense(&b, BLOCK, k), &mut b_lines);
            let mut results = Vec::new();
            for isa in Isa::available() {
                let mut sums = Sums::ZERO;
                Session::start(isa).block(&a_lines, &b_lines, &mut sums);
                for (i, sum) in sums.0.iter().enumerate() {
                    let (a, b) = (&a[i / 32 * k..][..k], &b[i % 32 * k..][..k]);
                    let terms = a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64());
                    let expected: f64 = terms.sum();
                    assert!((f64::from(*sum) - expected).abs() < 1e-6 * k as f64, "{isa:?} {k}");
                }
                results.push(sums);
            }
            match &results[..] {
                [] => println!("skipped: no bf16 products"),
                [_] => println!("skipped: one instruction set only"),
                [first, rest @ ..] => {
                    for other in rest {
                        for (x, y) in first.0.iter().zip(&other.0) {
                            // The order in which a pair is added differs.
                            assert!((x - y).abs() < 1e-6 * k as f32);
                        }
                    }
                }
            }
        }
    }
}
