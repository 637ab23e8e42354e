//! A share written as a percentage.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A share between 0 and 1, both excluded, written `25%`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Percent(f64);

impl Percent {
    /// The share.
    pub fn share(self) -> f64 {
        self.0
    }
}

/// A percentage that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a share; write a percentage above 0% and below 100%, like 25%")]
pub struct ParsePercentError(String);

impl FromStr for Percent {
    type Err = ParsePercentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.trim().strip_suffix('%').and_then(|percent| percent.trim().parse().ok());
        let share = number.map(|percent: f64| percent / 100.0);
        let share = share.filter(|share| *share > 0.0 && *share < 1.0);
        share.map(Self).ok_or_else(|| ParsePercentError(text.to_owned()))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", (self.0 * 1e8).round() / 1e6)
    }
}

impl TryFrom<String> for Percent {
    type Error = ParsePercentError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Percent> for String {
    fn from(percent: Percent) -> Self {
        percent.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_parse_what_they_print() {
        for text in ["25%", "12.5%", "0.1%", "99.9%"] {
            assert_eq!(text.parse::<Percent>().unwrap().to_string(), text);
        }
        for text in ["0%", "100%", "-5%", "25", "0.25", "x%", "", "%", "nan%"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }
}
