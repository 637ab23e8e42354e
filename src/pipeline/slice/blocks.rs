//! A basis for each half of a block, found in the model as it is sliced so far: the paper's algorithm.
//!
//! The stream stays in its original coordinates and is projected where the sliced model would keep
//! fewer: `h q` in `d'` coordinates and `h q qᵀ` in `d` are the same to every later matrix. So the
//! blocks run with their own weights, and the sliced ones are made when their bases are known.

use std::path::Path;

use super::super::{error::Result, progress::PhaseTimes};
use super::{
    SliceJob,
    stream::Stream,
    weights::{Bases, SlicedWriter},
};
use crate::{
    backend::{Backend, Dense},
    compress::slicegpt::{self, Covariance},
    model::{CapturePoint, NormKind},
};

impl SliceJob<'_> {
    /// Finds the bases and writes the model. Returns the share of the variance that each keeps.
    pub(super) fn make_in_blocks<B: Backend>(
        &self,
        b: &B,
        directory: &Path,
        times: &mut PhaseTimes,
    ) -> Result<Vec<f64>> {
        let blocks = self.source.config().num_hidden_layers;
        let [attn_half, mlp_half] = CapturePoint::HALVES;
        let mut stream = Stream::enter(b, self, times)?;
        let mut writer = SlicedWriter::create(b, self, directory)?;
        let mut kept = Vec::new();
        let mut attn = self.project(b, &mut stream, &mut kept, times)?;
        writer.write_before_blocks(&attn, times)?;
        for block in 0..blocks {
            let loaded = self.load(b, block, times)?;
            stream.advance(&loaded, attn_half, times)?;
            let mlp = self.project(b, &mut stream, &mut kept, times)?;
            stream.advance(&loaded, mlp_half, times)?;
            let after = if block + 1 < blocks || self.slicing.recipe.head {
                self.project(b, &mut stream, &mut kept, times)?
            } else {
                Dense::identity(self.slicing.hidden_size, self.slicing.hidden_size)
            };
            let bases = Bases { attn: &attn, mlp: &mlp, after: &after };
            writer.write_block(block, bases, times)?;
            attn = after;
        }
        writer.write_after_blocks(Some(&attn).filter(|_| self.slicing.recipe.head), times)?;
        writer.finish(times)?;
        Ok(kept)
    }

    /// The principal directions of the stream where it stands, onto which it is then projected.
    fn project<B: Backend>(
        &self,
        b: &B,
        stream: &mut Stream<'_, B>,
        kept: &mut Vec<f64>,
        times: &mut PhaseTimes,
    ) -> Result<Dense> {
        let centres = self.source.arch().norm == NormKind::Layer;
        let mut covariance = Covariance::new(self.slicing.hidden_size);
        stream.observe_raw(&mut covariance, times)?;
        if centres {
            covariance.centre();
        }
        let rotation = self.rotation(b, &covariance, times)?;
        kept.push(rotation.kept());
        let q = rotation.q;
        // h → (h q) qᵀ, and a weight is its transpose.
        let written = if centres { slicegpt::centred_rows(q.clone()) } else { q.clone() };
        let projector = b.dense_product(&q, &written.transposed())?;
        let projector = b.upload(&projector.to_f32(), projector.rows, projector.cols)?;
        stream.turn(&b.prepare(&[&projector])?, times)?;
        Ok(q)
    }
}
