//! Dense linear algebra by faer, behind a few concrete functions.
//!
//! faer's generic code is slow to compile, so it is instantiated here only. Every function runs on
//! the calling thread; callers cut the work.

use faer::linalg::matmul::{self, triangular, triangular::BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};

/// A row-major view: `rows × cols` values, rows `stride` values apart.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

impl<'a> View<'a> {
    /// All of a contiguous matrix.
    pub(super) fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols }
    }

    fn faer(self) -> MatRef<'a, f32> {
        let len = strided_len(self.rows, self.cols, self.stride);
        MatRef::from_row_major_slice_with_stride(
            &self.data[..len],
            self.rows,
            self.cols,
            self.stride.max(self.cols),
        )
    }
}

/// A row-major view to write to.
pub(super) struct ViewMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

impl<'a> ViewMut<'a> {
    fn faer(self) -> MatMut<'a, f32> {
        let len = strided_len(self.rows, self.cols, self.stride);
        // The transpose of a column-major view: faer 0.24.4's own constructor of strided row-major
        // views forgets to swap the strides of a mutable one and writes out of bounds.
        MatMut::from_column_major_slice_with_stride_mut(
            &mut self.data[..len],
            self.cols,
            self.rows,
            self.stride.max(self.cols),
        )
        .transpose_mut()
    }
}

fn strided_len(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// What a product does to the values it finds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    /// Overwrites them.
    Replace,
    /// Adds to them.
    Add,
}

impl From<Into> for Accum {
    fn from(into: Into) -> Self {
        match into {
            Into::Replace => Self::Replace,
            Into::Add => Self::Add,
        }
    }
}

/// `c = alpha · a b` (or `c +=`).
pub(super) fn matmul_nn(c: ViewMut, into: Into, a: View, b: View, alpha: f32) {
    matmul::matmul(c.faer(), into.into(), a.faer(), b.faer(), alpha, Par::Seq);
}

/// `c = alpha · a bᵀ` (or `c +=`).
pub(super) fn matmul_nt(c: ViewMut, into: Into, a: View, b: View, alpha: f32) {
    matmul::matmul(c.faer(), into.into(), a.faer(), b.faer().transpose(), alpha, Par::Seq);
}

/// `c += aᵀ b`.
pub(super) fn add_matmul_tn(c: ViewMut, a: View, b: View) {
    matmul::matmul(c.faer(), Accum::Add, a.faer().transpose(), b.faer(), 1.0, Par::Seq);
}

/// Lower triangle of `c += aᵀ a`.
pub(super) fn add_gram_lower(c: ViewMut, a: View) {
    let a = a.faer();
    triangular::matmul(
        c.faer(),
        BlockStructure::TriangularLower,
        Accum::Add,
        a.transpose(),
        BlockStructure::Rectangular,
        a,
        BlockStructure::Rectangular,
        1.0,
        Par::Seq,
    );
}

/// `c = a · lower(b)`, `b` square.
pub(super) fn matmul_lower(c: ViewMut, a: View, b: View) {
    triangular::matmul(
        c.faer(),
        BlockStructure::Rectangular,
        Accum::Replace,
        a.faer(),
        BlockStructure::Rectangular,
        b.faer(),
        BlockStructure::TriangularLower,
        1.0,
        Par::Seq,
    );
}

pub(super) use factor::{inverse_cholesky_lower, matmul_f64, solve_right, symmetric_eigen};

mod factor {
    use std::num::NonZero;

    use faer::diag::DiagMut;
    use faer::linalg::cholesky::llt::factor::{
        LltError, LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
    };
    use faer::linalg::cholesky::llt::solve::solve_in_place;
    use faer::linalg::evd::{
        ComputeEigenvectors, SelfAdjointEvdParams, self_adjoint_evd, self_adjoint_evd_scratch,
    };
    use faer::linalg::matmul::matmul;
    use faer::linalg::triangular_inverse::invert_lower_triangular;
    use faer::prelude::ReborrowMut;
    use faer::{Accum, MatMut, MatRef, Par, Spec};

    /// Into how many parts faer cuts work, whatever the number of threads: a result must not depend
    /// on that.
    const PARTS: Par = Par::Rayon(NonZero::new(8).unwrap());

    /// `L⁻¹` of the Cholesky factorisation `A = L Lᵀ`, column-major, from the lower triangle of the
    /// column-major `a`, which it overwrites; the index of the first bad pivot on failure.
    pub(in super::super) fn inverse_cholesky_lower(
        a: &mut [f64],
        n: usize,
    ) -> Result<Vec<f64>, usize> {
        cholesky(a, n)?;
        let mut inverse = vec![0.0; n * n];
        invert_lower_triangular(
            MatMut::from_column_major_slice_mut(&mut inverse, n, n),
            MatRef::from_column_major_slice(a, n, n),
            PARTS,
        );
        Ok(inverse)
    }

    /// Factorises the lower triangle of the column-major `a` in place.
    fn cholesky(a: &mut [f64], n: usize) -> Result<(), usize> {
        let params = Spec::<LltParams, f64>::default();
        let mut buffer =
            faer::dyn_stack::MemBuffer::new(cholesky_in_place_scratch::<f64>(n, PARTS, params));
        let stack = faer::dyn_stack::MemStack::new(&mut buffer);
        let mut factor = MatMut::from_column_major_slice_mut(a, n, n);
        let regularization = LltRegularization::default();
        cholesky_in_place(factor.rb_mut(), regularization, PARTS, stack, params)
            .map_err(|LltError::NonPositivePivot { index }| index)?;
        match (0..n).find(|&j| !(factor[(j, j)] > 0.0 && factor[(j, j)].is_finite())) {
            Some(pivot) => Err(pivot),
            None => Ok(()),
        }
    }

    /// `b a⁻¹` into the row-major `b: [m, n]`, from the lower triangle of the column-major `a: [n, n]`,
    /// which it overwrites; the index of the first bad pivot on failure.
    pub(in super::super) fn solve_right(
        a: &mut [f64],
        n: usize,
        b: &mut [f64],
        m: usize,
    ) -> Result<(), usize> {
        cholesky(a, n)?;
        // A row-major b is bᵀ by columns, and a⁻¹ is its own transpose.
        let rhs = MatMut::from_column_major_slice_mut(b, n, m);
        let mut buffer = faer::dyn_stack::MemBuffer::new(faer::dyn_stack::StackReq::EMPTY);
        let stack = faer::dyn_stack::MemStack::new(&mut buffer);
        solve_in_place(MatRef::from_column_major_slice(a, n, n), rhs, PARTS, stack);
        Ok(())
    }

    /// `c = a b`, all row-major: `a: [m, k]`, `b: [k, n]`.
    pub(in super::super) fn matmul_f64(c: &mut [f64], a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) {
        let c = MatMut::from_row_major_slice_mut(c, m, n);
        let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, k, n));
        matmul(c, Accum::Replace, a, b, 1.0, PARTS);
    }

    /// Ascending eigenvalues, and the eigenvectors column after column, of the symmetric matrix whose
    /// lower triangle the column-major `a` holds; `None` where the iteration does not converge.
    pub(in super::super) fn symmetric_eigen(a: &[f64], n: usize) -> Option<(Vec<f64>, Vec<f64>)> {
        let params = Spec::<SelfAdjointEvdParams, f64>::default();
        let (mut values, mut vectors) = (vec![0.0; n], vec![0.0; n * n]);
        let mut buffer = faer::dyn_stack::MemBuffer::new(self_adjoint_evd_scratch::<f64>(
            n,
            ComputeEigenvectors::Yes,
            PARTS,
            params,
        ));
        self_adjoint_evd(
            MatRef::from_column_major_slice(a, n, n),
            DiagMut::from_slice_mut(&mut values),
            Some(MatMut::from_column_major_slice_mut(&mut vectors, n, n)),
            PARTS,
            faer::dyn_stack::MemStack::new(&mut buffer),
            params,
        )
        .ok()?;
        Some((values, vectors))
    }
}
