//! The vocabulary of a decoder block: which linears it has, which spaces they connect, and where
//! their inputs can be observed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a linear layer of a block does. A plain MLP has no [`GateProj`](Self::GateProj).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Attention output.
    OProj,
    /// Gate of a gated MLP.
    GateProj,
    /// First matrix of the MLP.
    UpProj,
    /// Second matrix of the MLP.
    DownProj,
}

impl Role {
    /// Every role, in the order in which a block applies them.
    pub const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// The name, spelled as in Llama checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A space of features that a linear reads from or writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Space {
    /// The residual stream.
    Residual,
    /// Queries and keys, head by head.
    Qk,
    /// Values, head by head.
    V,
    /// Inside the MLP.
    Mlp,
    /// Token scores.
    Vocab,
}

/// Where in a block activations can be observed: the input of one stage of linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapturePoint {
    /// Input of the query, key and value projections.
    AttnIn,
    /// Input of the attention output projection.
    AttnOut,
    /// Input of the first MLP matrices.
    MlpIn,
    /// Input of the second MLP matrix.
    MlpHidden,
}

impl CapturePoint {
    /// Every point, in the order in which a block reaches them.
    pub const ALL: [Self; 4] = [Self::AttnIn, Self::AttnOut, Self::MlpIn, Self::MlpHidden];

    /// The attention and the MLP: where each reads the residual stream, and where it adds to it.
    pub const HALVES: [[Self; 2]; 2] =
        [[Self::AttnIn, Self::AttnOut], [Self::MlpIn, Self::MlpHidden]];

    /// The name in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AttnIn => "attn_in",
            Self::AttnOut => "attn_out",
            Self::MlpIn => "mlp_in",
            Self::MlpHidden => "mlp_hidden",
        }
    }
}

impl fmt::Display for CapturePoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
