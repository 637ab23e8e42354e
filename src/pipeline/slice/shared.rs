//! One basis for the whole model.

use std::path::Path;

use super::super::{error::Result, progress::PhaseTimes};
use super::{
    SliceJob,
    stream::Stream,
    weights::{Bases, SlicedWriter},
};
use crate::{
    backend::{Backend, Dense},
    compress::slicegpt::Covariance,
    model::CapturePoint,
};

impl SliceJob<'_> {
    /// Finds the basis and writes the model. Returns the share of the variance that the basis keeps.
    pub(super) fn make_shared<B: Backend>(
        &self,
        b: &B,
        directory: &Path,
        times: &mut PhaseTimes,
    ) -> Result<Vec<f64>> {
        let covariance = self.covariance(b, times)?;
        let rotation = self.rotation(b, &covariance, times)?;
        let mut writer = SlicedWriter::create(b, self, directory)?;
        match self.slicing.recipe.damp {
            Some(damp) => self.write_corrected(b, &rotation.q, damp, &mut writer, times)?,
            None => self.write_plain(&rotation.q, &mut writer, times)?,
        }
        writer.finish(times)?;
        Ok(vec![rotation.kept()])
    }

    fn write_plain<B: Backend>(
        &self,
        q: &Dense,
        writer: &mut SlicedWriter<'_, B>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        writer.write_before_blocks(q, times)?;
        for block in 0..self.source.config().num_hidden_layers {
            writer.write_block(block, Bases::shared(q), times)?;
        }
        writer.write_after_blocks(Some(q), times)
    }

    /// The second moment of the stream, each token divided by its root mean square, where a norm reads
    /// it: before every attention and every MLP, and before the output matrix.
    fn covariance<B: Backend>(&self, b: &B, times: &mut PhaseTimes) -> Result<Covariance> {
        let config = self.source.config();
        let [attn_half, mlp_half] = CapturePoint::HALVES;
        let mut stream = Stream::enter(b, self, times)?;
        let mut sum = Covariance::new(config.hidden_size);
        for block in 0..config.num_hidden_layers {
            let loaded = self.load(b, block, times)?;
            stream.observe_normalised(&mut sum, times)?;
            stream.advance(&loaded, attn_half, times)?;
            stream.observe_normalised(&mut sum, times)?;
            stream.advance(&loaded, mlp_half, times)?;
            self.source.release(block);
        }
        stream.observe_normalised(&mut sum, times)?;
        Ok(sum)
    }
}
