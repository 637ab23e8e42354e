//! Rotary embeddings: frequencies, their Llama 3 scaling, and the tables of cosines and sines.
//!
//! Frequencies and angles are rounded to f32 where the models' reference implementation rounds
//! them: at position 10 000 the rounding of an angle is larger than any other error of the forward
//! pass, and the weights were trained with it.

use std::f64::consts::TAU;

use super::config::check;
use super::error::{ModelError, Result};
use crate::backend::RopeTables;

/// Rotary embeddings of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies by a setting.
    pub scaling: Option<Llama3Scaling>,
    /// Divisors of the frequencies, one each, as a GGUF file stores them.
    pub factors: Option<Vec<f32>>,
}

/// The scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones are left alone,
/// those between are blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the low frequencies.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched fully.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Context length before the scaling.
    pub original_max_position_embeddings: usize,
}

impl Llama3Scaling {
    /// Divisor of a frequency.
    fn divisor(&self, frequency: f64) -> f64 {
        let context = self.original_max_position_embeddings as f64;
        let wavelength = TAU / frequency;
        if wavelength < context / self.high_freq_factor {
            1.0
        } else if wavelength > context / self.low_freq_factor {
            self.factor
        } else {
            let smooth = (context / wavelength - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            1.0 / ((1.0 - smooth) / self.factor + smooth)
        }
    }
}

impl RopeConfig {
    /// The frequencies `theta^(−2j / head_dim)`, scaled: radians a position.
    ///
    /// # Precision
    /// Powers and scaling in f64, rounded to f32 before and after the scaling.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|j| {
                let frequency = self.unscaled(j, head_dim);
                let divisor = match (&self.factors, &self.scaling) {
                    (Some(factors), _) => f64::from(factors[j]),
                    (None, Some(scaling)) => scaling.divisor(frequency),
                    (None, None) => 1.0,
                };
                (frequency / divisor) as f32
            })
            .collect()
    }

    fn unscaled(&self, j: usize, head_dim: usize) -> f64 {
        let power = self.theta.powf(2.0 * j as f64 / head_dim as f64) as f32;
        f64::from(1.0 / power)
    }

    /// The divisors of the frequencies as a GGUF file stores them; none where all are 1.
    pub fn gguf_factors(&self, head_dim: usize) -> Option<Vec<f32>> {
        let scaling = match (&self.factors, &self.scaling) {
            (Some(factors), _) => return Some(factors.clone()),
            (None, scaling) => scaling.as_ref()?,
        };
        let divisor = |j| scaling.divisor(self.unscaled(j, head_dim)) as f32;
        Some((0..head_dim / 2).map(divisor).collect())
    }

    /// The setting that gives these divisors, if they are not all 1. The factor is the largest
    /// divisor, and the bounds are the 1 and 4 of every Llama 3 model; a blended divisor then gives
    /// the original context length.
    ///
    /// # Errors
    /// [`ModelError::RopeFactors`] when there is no such setting.
    pub(crate) fn llama3_of_factors(
        &self,
        factors: &[f32],
        head_dim: usize,
    ) -> Result<Option<Llama3Scaling>> {
        const LOW: f64 = 1.0;
        const HIGH: f64 = 4.0;
        // What the published Llama 3.1 to 3.3 models have.
        const USUAL_CONTEXT: usize = 8192;
        // The converter computes divisors in f32, so they carry a few units of its rounding.
        const TOLERANCE: f64 = 1e-5;
        let largest = factors.iter().copied().fold(1.0f32, f32::max);
        if factors.iter().all(|factor| (f64::from(*factor) - 1.0).abs() < TOLERANCE) {
            return Ok(None);
        }
        let factor = f64::from(largest);
        let blended = factors
            .iter()
            .position(|divisor| *divisor > 1.0 && f64::from(*divisor) < factor * (1.0 - TOLERANCE));
        let context = blended.map_or(USUAL_CONTEXT, |j| {
            let inverse = 1.0 / factor;
            let smooth = (1.0 / f64::from(factors[j]) - inverse) / (1.0 - inverse);
            let wavelength = TAU / self.unscaled(j, head_dim);
            (wavelength * (smooth * (HIGH - LOW) + LOW)).round() as usize
        });
        let scaling = Llama3Scaling {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_max_position_embeddings: context,
        };
        let same = factors.iter().enumerate().all(|(j, found)| {
            let expected = scaling.divisor(self.unscaled(j, head_dim));
            (f64::from(*found) / expected - 1.0).abs() < TOLERANCE
        });
        if same && context > 0 { Ok(Some(scaling)) } else { Err(ModelError::RopeFactors) }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`InvalidValue`](super::ModelError::InvalidValue) naming the key.
    pub(crate) fn validate(&self, head_dim: usize) -> Result<()> {
        let positive = |key: &str, value: f64| {
            check(value.is_finite() && value > 0.0, key, value, || "a positive number".to_owned())
        };
        positive("rope_theta", self.theta)?;
        if let Some(scaling) = &self.scaling {
            positive("factor", scaling.factor)?;
            positive("low_freq_factor", scaling.low_freq_factor)?;
            positive("high_freq_factor", scaling.high_freq_factor)?;
            let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
            check(high > low, "high_freq_factor", high, || {
                format!("more than low_freq_factor = {low}")
            })?;
            let context = scaling.original_max_position_embeddings;
            check(context > 0, "original_max_position_embeddings", context, || {
                "a positive whole number".to_owned()
            })?;
        }
        if let Some(factors) = &self.factors {
            check(factors.len() == head_dim / 2, "rope_freqs.weight", factors.len(), || {
                format!("{} factors", head_dim / 2)
            })?;
            for factor in factors {
                positive("rope_freqs.weight", f64::from(*factor))?;
            }
        }
        Ok(())
    }
}

/// Cosines and sines of positions `0..positions`.
///
/// # Shapes
/// `[positions, head_dim / 2]` each.
///
/// # Precision
/// The angle is an f32 product; its cosine and sine are computed in f64.
pub(crate) fn tables(rope: &RopeConfig, head_dim: usize, positions: usize) -> RopeTables {
    let frequencies = rope.frequencies(head_dim);
    let angles = (0..positions)
        .flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
    let (cos, sin) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
    RopeTables { half_dim: head_dim / 2, cos, sin }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: Llama3Scaling = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    fn rope(theta: f64, scaling: Option<Llama3Scaling>) -> RopeConfig {
        RopeConfig { theta, scaling, factors: None }
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found:e} {expected:e}");
        }
    }

    // Golden numbers of this module: transformers 5.17,
    //   LlamaRotaryEmbedding(LlamaConfig(hidden_size=2*hd, num_attention_heads=2, head_dim=hd,
    //       rope_parameters=dict(rope_theta=theta, ...))).inv_freq, and its cos and sin of a position.

    #[test]
    fn frequencies_equal_transformers() {
        assert_close(
            &rope(100_000.0, None).frequencies(8),
            &[1.0, 5.623_413e-2, 3.162_277_9e-3, 1.778_279_4e-4],
        );
        assert_close(
            &rope(500_000.0, Some(LLAMA3)).frequencies(16),
            &[
                1.0,
                1.939_227_6e-1,
                3.760_603e-2,
                7.292_665e-3,
                5.248_46e-4,
                3.428_102_4e-5,
                6.647_869_7e-6,
                1.289_173_2e-6,
            ],
        );
    }

    #[test]
    fn tables_hold_cosines_and_sines_by_position() {
        let tables = tables(&rope(100_000.0, None), 8, 2048);
        assert_eq!((tables.half_dim, tables.cos.len(), tables.sin.len()), (4, 8192, 8192));
        assert_eq!(
            (tables.cos[..4].to_vec(), tables.sin[..4].to_vec()),
            (vec![1.0; 4], vec![0.0; 4])
        );
        let cases = [
            (7, 1, 9.235_195e-1, 3.835_515_4e-1),
            (1000, 2, -9.997_861e-1, -2.068_380_8e-2),
            (2047, 3, 9.344_753_6e-1, 3.560_278_7e-1),
            (2047, 1, -4.287_670_9e-1, 9.034_151e-1),
        ];
        for (position, j, cos, sin) in cases {
            assert_close(
                &[tables.cos[4 * position + j], tables.sin[4 * position + j]],
                &[cos, sin],
            );
        }
    }

    #[test]
    fn stored_factors_give_the_setting_back() {
        for (scaling, theta, head_dim) in [
            (LLAMA3, 500_000.0, 128),
            (Llama3Scaling { factor: 32.0, ..LLAMA3 }, 500_000.0, 64),
            (Llama3Scaling { original_max_position_embeddings: 32, ..LLAMA3 }, 500.0, 16),
        ] {
            let plain = rope(theta, None);
            let factors: Vec<f32> = (0..head_dim / 2)
                .map(|j| scaling.divisor(plain.unscaled(j, head_dim)) as f32)
                .collect();
            assert_eq!(plain.llama3_of_factors(&factors, head_dim).unwrap(), Some(scaling));
            let stored = RopeConfig { theta, scaling: None, factors: Some(factors) };
            assert_close(
                &stored.frequencies(head_dim),
                &rope(theta, Some(scaling)).frequencies(head_dim),
            );
        }
        let plain = rope(10_000.0, None);
        assert_eq!(plain.llama3_of_factors(&[1.0; 8], 16).unwrap(), None);
        let odd: Vec<f32> = (0..8u8).map(|j| 1.0 + f32::from(j)).collect();
        assert!(plain.llama3_of_factors(&odd, 16).is_err());
    }

    #[test]
    fn senseless_settings_are_refused_by_key() {
        let message = |rope: RopeConfig| rope.validate(16).unwrap_err().to_string();
        assert_eq!(
            message(rope(-1.0, None)),
            "configuration key `rope_theta` is -1 (expected a positive number)"
        );
        assert_eq!(
            message(rope(1e4, Some(Llama3Scaling { high_freq_factor: 1.0, ..LLAMA3 }))),
            "configuration key `high_freq_factor` is 1 (expected more than low_freq_factor = 1)"
        );
        assert_eq!(
            message(RopeConfig { theta: 1e4, scaling: None, factors: Some(vec![1.0; 7]) }),
            "configuration key `rope_freqs.weight` is 7 (expected 8 factors)"
        );
    }
}
