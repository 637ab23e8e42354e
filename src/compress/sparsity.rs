//! How sparse a layer shall be.

use std::{fmt, str::FromStr};

use crate::backend::Selection;

/// Target of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// This fraction of the weights becomes zero, wherever they are.
    Unstructured(f64),
    /// `n` of every `m` consecutive weights of a row stay; the others become zero.
    NofM {
        /// Kept weights of a group.
        n: usize,
        /// Columns of a group.
        m: usize,
    },
}

/// Largest group of an n:m pattern: packed metadata has 4-bit positions.
const MAX_GROUP: usize = 16;

impl Sparsity {
    /// Whether a matrix with `cols` columns can carry the pattern.
    pub fn fits(self, cols: usize) -> bool {
        match self {
            Self::Unstructured(_) => true,
            Self::NofM { m, .. } => cols.is_multiple_of(m),
        }
    }

    /// Fraction of weights that become zero.
    pub fn fraction(self) -> f64 {
        match self {
            Self::Unstructured(fraction) => fraction,
            Self::NofM { n, m } => (m - n) as f64 / m as f64,
        }
    }

    /// Zeros among `count` weights that compete with each other, rounded down.
    pub fn zeros_of(self, count: usize) -> usize {
        match self {
            // A hair above, so that 0.7 × 10 is 7 and not 6 for want of a binary 0.7.
            Self::Unstructured(fraction) => {
                ((count as f64 * fraction + 1e-9 * count as f64) as usize).min(count)
            }
            Self::NofM { n, m } => count / m * (m - n),
        }
    }

    /// The selection when weights compete within the whole layer.
    pub fn per_tensor(self, rows: usize, cols: usize) -> Selection {
        match self {
            Self::Unstructured(_) => Selection::Tensor { zeros: self.zeros_of(rows * cols) },
            Self::NofM { n, m } => Selection::Group { zeros: m - n, m },
        }
    }

    /// The selection when weights compete within a row.
    pub fn per_row(self, cols: usize) -> Selection {
        match self {
            Self::Unstructured(_) => Selection::Row { zeros: self.zeros_of(cols) },
            Self::NofM { n, m } => Selection::Group { zeros: m - n, m },
        }
    }
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unstructured(fraction) => {
                let percent = (fraction * 1e8).round() / 1e6;
                write!(f, "{percent}%")
            }
            Self::NofM { n, m } => write!(f, "{n}:{m}"),
        }
    }
}

/// A sparsity that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a sparsity: {reason}; write a percentage like 50% or kept:group like 2:4")]
pub struct ParseSparsityError {
    text: String,
    reason: &'static str,
}

impl FromStr for Sparsity {
    type Err = ParseSparsityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| ParseSparsityError { text: text.to_owned(), reason };
        let fraction = |value: f64| {
            if value > 0.0 && value < 1.0 {
                Ok(Self::Unstructured(value))
            } else {
                Err(fail("the fraction must lie between 0 and 1, both excluded"))
            }
        };
        if let Some((n, m)) = text.split_once(':') {
            let parse = |part: &str| part.trim().parse::<usize>();
            let (Ok(n), Ok(m)) = (parse(n), parse(m)) else {
                return Err(fail("kept and group must be whole numbers"));
            };
            if m > MAX_GROUP {
                return Err(fail("groups wider than 16 are not supported"));
            }
            if n == 0 || n >= m {
                return Err(fail("kept must be at least 1 and less than the group"));
            }
            return Ok(Self::NofM { n, m });
        }
        if let Some(percent) = text.strip_suffix('%') {
            let value: f64 = percent.trim().parse().map_err(|_| fail("not a number"))?;
            return fraction(value / 100.0);
        }
        fraction(text.trim().parse().map_err(|_| fail("not a number"))?)
    }
}

impl serde::Serialize for Sparsity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Sparsity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for Sparsity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Sparsity".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "a percentage like 50%, or kept:group like 2:4",
            "pattern": r"^(\d+(\.\d+)?%|0?\.\d+|\d+:\d+)$"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints() {
        for text in ["2:4", "4:8", "1:4", "6:8", "8:16", "50%", "62.5%", "70%"] {
            let sparsity: Sparsity = text.parse().unwrap();
            assert_eq!(sparsity.to_string(), text);
        }
        assert_eq!("0.5".parse(), Ok(Sparsity::Unstructured(0.5)));
    }

    #[test]
    fn refuses_nonsense_with_a_reason() {
        for (text, reason) in [
            ("4:4", "less than the group"),
            ("0:4", "at least 1"),
            ("8:32", "wider than 16"),
            ("a:4", "whole numbers"),
            ("0%", "between 0 and 1"),
            ("100%", "between 0 and 1"),
            ("half", "not a number"),
            ("NaN", "between 0 and 1"),
        ] {
            let error = text.parse::<Sparsity>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn counts_are_exact_where_binary_fractions_are_not() {
        assert_eq!(Sparsity::Unstructured(0.7).zeros_of(10), 7);
        assert_eq!(Sparsity::Unstructured(0.29).zeros_of(100), 29);
        assert_eq!(Sparsity::NofM { n: 6, m: 8 }.zeros_of(64), 16);
    }
}
