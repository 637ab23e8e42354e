//! Parameter and FLOP counts that follow from the dimensions alone.

use serde::Serialize;

use super::super::arch::{Architecture, Positions};
use super::super::roles::CapturePoint;
use super::ModelConfig;

/// Parameters by part. Tied embeddings count once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// Token embeddings, which are the output matrix too where they are tied.
    pub embedding: u64,
    /// Learned positions.
    pub positions: u64,
    /// Weights of the blocks' linears.
    pub linear: u64,
    /// Biases of the blocks' linears.
    pub bias: u64,
    /// Norms.
    pub norm: u64,
    /// Matrices on the shortcuts of a sliced model.
    pub shortcut: u64,
    /// The output matrix where it is not tied.
    pub lm_head: u64,
}

impl ParameterCount {
    /// All parameters.
    pub fn total(&self) -> u64 {
        let inside = self.linear + self.bias + self.norm + self.shortcut;
        self.embedding + self.positions + inside + self.lm_head
    }
}

/// Floating-point operations for one token of a forward pass; a multiply-add is two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FlopsPerToken {
    /// The blocks' linears, and the matrices on the shortcuts of a sliced model.
    pub linear: u64,
    /// Products of queries with keys, and of their weights with values.
    pub attention: u64,
    /// The output matrix.
    pub lm_head: u64,
    /// Gram matrices of the inputs of one block, lower triangles, during calibration.
    pub gram_per_block: u64,
}

impl ModelConfig {
    /// Counts parameters.
    pub fn parameters(&self, arch: &Architecture) -> ParameterCount {
        let blocks = self.num_hidden_layers as u64;
        let hidden = self.hidden_size as u64;
        let table = self.vocab_size as u64 * hidden;
        let exit = self.exit_width() as u64;
        let head = self.vocab_size as u64 * (exit + u64::from(arch.lm_head_bias));
        let mut count = ParameterCount {
            embedding: table,
            positions: match arch.positions {
                Positions::Rope => 0,
                Positions::Learned { offset } => {
                    (self.max_position_embeddings + offset) as u64 * hidden
                }
            },
            linear: self.linear_weights(arch),
            bias: 0,
            norm: 0,
            shortcut: self.shortcut_weights(arch),
            lm_head: if self.tie_word_embeddings { 0 } else { head },
        };
        for role in arch.linears.iter().map(|linear| linear.role) {
            if self.has_bias(role) {
                let rows = |block| self.linear_shape_in(block, role)[0] as u64;
                count.bias += (0..self.num_hidden_layers).map(rows).sum::<u64>();
            }
        }
        for (norm, columns) in [
            (&arch.attn_norm, hidden * blocks),
            (&arch.mlp_norm, hidden * blocks),
            (&arch.final_norm, exit),
        ] {
            count.norm += columns * (1 + u64::from(norm.bias));
        }
        count
    }

    /// Counts the FLOPs of a token that attends to `context` tokens; over a causal window of `n`
    /// tokens the mean context is `(n + 1) / 2`.
    pub fn flops_per_token(&self, arch: &Architecture, context: usize) -> FlopsPerToken {
        let blocks = self.num_hidden_layers as u64;
        let gram = |point| {
            let width = self.capture_width(point) as u64;
            width * (width + 1)
        };
        FlopsPerToken {
            linear: 2 * (self.linear_weights(arch) + self.shortcut_weights(arch)),
            attention: 4 * context as u64 * self.q_features() as u64 * blocks,
            lm_head: 2 * self.vocab_size as u64 * self.exit_width() as u64,
            gram_per_block: CapturePoint::ALL.into_iter().map(gram).sum(),
        }
    }

    fn linear_weights(&self, arch: &Architecture) -> u64 {
        let weights = |[rows, cols]: [usize; 2]| rows as u64 * cols as u64;
        let block = |block| {
            let linears = arch.linears.iter();
            linears.map(|linear| weights(self.linear_shape_in(block, linear.role))).sum::<u64>()
        };
        (0..self.num_hidden_layers).map(block).sum()
    }

    /// Weights on the shortcuts of all blocks.
    pub fn shortcut_weights(&self, arch: &Architecture) -> u64 {
        if arch.shortcuts.is_none() {
            return 0;
        }
        let hidden = self.hidden_size as u64;
        let block = |block| hidden * (hidden + self.width_after(block) as u64);
        (0..self.num_hidden_layers).map(block).sum()
    }
}
