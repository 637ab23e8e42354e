//! Results recorded from independent implementations, see fixtures/README.md.
//!
//! Each test prints the largest difference it found; `cargo test --test main parity --
//! --nocapture` gives the table of docs/NUMERICS.md.

mod end_to_end;
mod forward;
mod gptq;
mod slicegpt;
mod sparsegpt;
mod wanda;

use safetensors::SafeTensors;

use crate::harness::fixture;

/// A safetensors file of recorded values.
struct Golden(Vec<u8>);

impl Golden {
    fn open(path: &str) -> Self {
        Self(std::fs::read(fixture(path)).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).unwrap().data().to_vec()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).unwrap().shape().to_vec()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64s(&self, name: &str) -> Vec<f64> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let bytes = self.bytes(name);
        let ids = bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        ids.map(|id| u32::try_from(id).unwrap()).collect()
    }

    /// A string of the header's metadata.
    fn metadata<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, key: &str) -> T {
        let (_, header) = SafeTensors::read_metadata(&self.0).unwrap();
        header.metadata().as_ref().unwrap()[key].parse().unwrap()
    }
}

/// How far values are from recorded ones.
#[derive(Debug, Clone, Copy, Default)]
struct Difference {
    /// `‖got − recorded‖ / ‖recorded‖`.
    norm: f64,
    /// Largest difference of an element over the largest recorded magnitude.
    max: f64,
}

impl Difference {
    fn of(got: &[f32], recorded: &[f32]) -> Self {
        assert_eq!(got.len(), recorded.len());
        let wide = |x: &f32| f64::from(*x);
        let lost = || got.iter().zip(recorded).map(|(a, b)| wide(a) - wide(b));
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let largest = |values: &mut dyn Iterator<Item = f64>| {
            // A NaN must not pass as small.
            values.fold(0.0, |largest, x| if x.abs() <= largest { largest } else { x.abs() })
        };
        Self {
            norm: norm(&mut lost()) / norm(&mut recorded.iter().map(wide)),
            max: largest(&mut lost()) / largest(&mut recorded.iter().map(wide)),
        }
    }

    fn within(self, tolerance: f64) -> bool {
        self.norm <= tolerance && self.max <= tolerance
    }

    fn worst(self, other: Self) -> Self {
        Self { norm: self.norm.max(other.norm), max: self.max.max(other.max) }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "norm {:.1e}, max {:.1e}", self.norm, self.max)
    }
}
