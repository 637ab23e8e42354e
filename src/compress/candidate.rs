//! One thing that can be done to a layer: a pattern, a grid, or both.

use std::{fmt, str::FromStr};

use super::{Scheme, Sparsity};

/// A pattern, a grid, or both: `2:4`, `int4`, `50% int4`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// What becomes zero.
    pub sparsity: Option<Sparsity>,
    /// What weights are rounded to.
    pub scheme: Option<Scheme>,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sparsity, self.scheme) {
            (Some(sparsity), Some(scheme)) => write!(f, "{sparsity} {scheme}"),
            (Some(sparsity), None) => sparsity.fmt(f),
            (None, Some(scheme)) => scheme.fmt(f),
            (None, None) => f.write_str("none"),
        }
    }
}

impl FromStr for Candidate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let sparsity = |word: &str| word.parse::<Sparsity>().map_err(|error| error.to_string());
        let scheme = |word: &str| word.parse::<Scheme>().map_err(|error| error.to_string());
        match words.as_slice() {
            [first, second] => {
                Ok(Self { sparsity: Some(sparsity(first)?), scheme: Some(scheme(second)?) })
            }
            [word] if word.starts_with(|c: char| c.is_ascii_digit()) => {
                Ok(Self { sparsity: Some(sparsity(word)?), scheme: None })
            }
            [word] => Ok(Self { sparsity: None, scheme: Some(scheme(word)?) }),
            _ => Err(format!(
                "`{text}` is not a candidate; write a pattern, a scheme, or both, like 2:4, int4 or \
                 50% int4"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_parse_what_they_print() {
        for text in ["2:4", "int4", "50% int4", "4:8 q4_0", "f8_e4m3"] {
            assert_eq!(text.parse::<Candidate>().unwrap().to_string(), text);
        }
        for text in ["", "int4 2:4", "2:4 int4 int8", "none"] {
            assert!(text.parse::<Candidate>().is_err(), "{text}");
        }
    }
}
