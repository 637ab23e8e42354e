//! Made-up weights and activations, the same in every run.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    backend::{Backend, BackendError},
    pipeline::budget::BATCH_TOKENS,
};

/// Whole batches that differ. They are shown in turn, so that any number of tokens takes the memory of
/// these; more tokens then make no matrix of higher rank, which no phase's time depends on.
pub(super) const DISTINCT: usize = 2;
/// Of the norm that brings activations into the type of products.
pub(super) const EPSILON: f32 = 1e-5;

const SEED: u64 = 1;
/// Correlation of neighbouring features.
const CORRELATION: f32 = 0.5;
/// Scale of the last feature; the first has 1, and those between decay like `1 / (1 + c·j)`.
const LAST_SCALE: f32 = 1.0 / 16.0;

/// Weights `[rows, cols]`, nearly normal (the sum of four uniform values), of a standard deviation of 0.02.
pub(super) fn weight(rows: usize, cols: usize) -> Vec<f32> {
    const DEVIATION: f32 = 0.02;
    // A uniform value of 0 to 65535 has a variance of 65536² / 12.
    let scale = DEVIATION * (12.0f32 / 4.0).sqrt() / 65536.0;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let value = |_| {
        let bits: u64 = rng.random();
        let sum = [0, 16, 32, 48].map(|shift| i64::from((bits >> shift) as u16));
        (sum.iter().sum::<i64>() - 2 * 65535) as f32 * scale
    };
    (0..rows * cols).map(value).collect()
}

/// Activations `[tokens, cols]` of batch `index`: each feature is half its neighbour and half noise, and
/// scales decay from the first feature to the last.
fn activations(index: usize, tokens: usize, cols: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    rng.set_stream(1 + index as u64);
    let fresh = (1.0 - CORRELATION * CORRELATION).sqrt();
    let decay = (1.0 / LAST_SCALE - 1.0) / cols.max(2) as f32;
    let mut values = Vec::with_capacity(tokens * cols);
    for _ in 0..tokens {
        let mut state: f32 = rng.random_range(-1.0..1.0);
        for feature in 0..cols {
            values.push(state / (1.0 + decay * feature as f32));
            state = CORRELATION * state + fresh * rng.random_range(-1.0f32..1.0);
        }
    }
    values
}

/// Batches of activations on the device, in the type of products.
pub(super) struct Batches<M> {
    /// Whole batches, the distinct ones.
    whole: Vec<M>,
    /// How often one of them is shown.
    shown: usize,
    /// What is left of the tokens.
    rest: Option<M>,
}

impl<M> Batches<M> {
    /// Batches of [`BATCH_TOKENS`] and a shorter one, `tokens` together.
    pub(super) fn new<B: Backend<Matrix = M>>(
        b: &B,
        tokens: usize,
        cols: usize,
    ) -> Result<Self, BackendError> {
        let gain = b.upload(&vec![1.0; cols], 1, cols)?;
        let batch = |index, tokens| {
            let x = b.upload(&activations(index, tokens, cols), tokens, cols)?;
            b.rms_norm(&x, &gain, EPSILON)
        };
        let (shown, rest) = (tokens / BATCH_TOKENS, tokens % BATCH_TOKENS);
        let whole = (0..shown.min(DISTINCT)).map(|index| batch(index, BATCH_TOKENS));
        Ok(Self {
            whole: whole.collect::<Result<_, _>>()?,
            shown,
            rest: (rest > 0).then(|| batch(DISTINCT, rest)).transpose()?,
        })
    }

    /// How many differ.
    pub(super) fn distinct(&self) -> usize {
        self.whole.len() + usize::from(self.rest.is_some())
    }

    /// Every batch in the order of a pass.
    pub(super) fn iter(&self) -> impl Iterator<Item = &M> {
        self.whole.iter().cycle().take(self.shown).chain(&self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Precision, Storage, cpu::Cpu};

    #[test]
    fn weights_are_centred_and_of_the_deviation_named() {
        let values = weight(200, 300);
        let count = values.len() as f64;
        let mean = values.iter().map(|&w| f64::from(w)).sum::<f64>() / count;
        let variance = values.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / count;
        assert!(mean.abs() < 3.0 * 0.02 / count.sqrt(), "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 2e-4, "{}", variance.sqrt());
    }

    #[test]
    fn features_decay_and_neighbours_are_correlated() {
        let (tokens, cols) = (4000, 64);
        let x = activations(0, tokens, cols);
        let moment = |a: usize, b: usize| {
            x.chunks_exact(cols).map(|row| f64::from(row[a] * row[b])).sum::<f64>()
        };
        let correlation = moment(30, 31) / (moment(30, 30) * moment(31, 31)).sqrt();
        assert!((correlation - 0.5).abs() < 0.05, "{correlation}");
        let decay = (moment(63, 63) / moment(0, 0)).sqrt();
        assert!((decay - 1.0 / 16.0).abs() < 0.01, "{decay}");
        assert_ne!(activations(1, 1, 8), activations(0, 1, 8));
    }

    #[test]
    fn batches_add_up_to_the_tokens_and_take_turns() {
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        for (tokens, distinct) in [(1, 1), (2048, 1), (5 * 2048 + 7, 3), (3 * 2048, 2)] {
            let batches = Batches::new(&b, tokens, 4).unwrap();
            let all: Vec<_> = batches.iter().collect();
            assert_eq!(all.iter().map(|x| b.shape(x).0).sum::<usize>(), tokens);
            assert_eq!(batches.distinct(), distinct, "{tokens}");
            if let [first, second, third, ..] = all[..] {
                assert!(std::ptr::eq(first, third) && !std::ptr::eq(first, second));
            }
        }
    }
}
