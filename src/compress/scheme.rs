//! What a user calls a grid: `int4`, `f8_e4m3`, `q4_0`, and the columns that share a scale.

use std::{fmt, str::FromStr};

use sparsepack_formats::{
    DType, GgmlType,
    encoding::{IntGrid, ggml::BlockGrid},
};

use super::Candidate;
use crate::backend::{Grid, ScaleSearch};

/// Type of the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Integers of 2 to 8 bits.
    Int(u8),
    /// 8-bit floats with a scale for each row.
    F8E4m3,
    /// A block type of ggml.
    Block(GgmlType),
}

/// Group of integers narrower than this by default; 8 bits need none.
const DEFAULT_GROUP: u32 = 128;

/// How a grid is laid over a matrix, as far as the scheme leaves that open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GridOptions {
    /// Columns that share a scale; integers only.
    pub group_size: Option<GroupSize>,
    /// Whether zero points are all 0; integers only.
    pub symmetric: bool,
    /// How scales are chosen.
    pub scales: ScaleSearch,
}

impl Scheme {
    /// The grid of a matrix whose scales are stored as `scale`. `None` for a block type that nothing
    /// is solved for.
    pub fn grid(self, options: GridOptions, scale: DType) -> Option<Grid> {
        Some(match self {
            Self::Int(bits) => Grid::Int {
                grid: IntGrid {
                    bits,
                    group_size: match options.group_size {
                        Some(GroupSize::Columns(columns)) => Some(columns),
                        Some(GroupSize::Channel) => None,
                        None => (bits < 8).then_some(DEFAULT_GROUP),
                    },
                    symmetric: options.symmetric,
                    scale,
                },
                search: options.scales,
            },
            Self::F8E4m3 => Grid::F8E4m3 { scale },
            Self::Block(ty) => Grid::Block { ty, grid: BlockGrid::of(ty)?, search: options.scales },
        })
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(bits) => write!(f, "int{bits}"),
            Self::F8E4m3 => f.write_str("f8_e4m3"),
            Self::Block(ty) => f.write_str(&ty.name().to_ascii_lowercase()),
        }
    }
}

/// A scheme that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a quantization scheme; write int2 to int8, f8_e4m3, or a block type of GGUF files: q8_0, q6_k, q5_0, q5_k, q4_0, q4_k, q3_k, q2_k"
)]
pub struct ParseSchemeError {
    text: String,
}

impl FromStr for Scheme {
    type Err = ParseSchemeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseSchemeError { text: text.to_owned() };
        let lower = text.to_ascii_lowercase();
        if lower == "f8_e4m3" || lower == "fp8" {
            return Ok(Self::F8E4m3);
        }
        if let Some(bits) = lower.strip_prefix("int") {
            let bits = bits.parse().map_err(|_| fail())?;
            return if (2..=8).contains(&bits) { Ok(Self::Int(bits)) } else { Err(fail()) };
        }
        let mut blocks = BlockGrid::TYPES.into_iter().map(Self::Block);
        blocks.find(|block| block.to_string() == lower).ok_or_else(fail)
    }
}

/// Columns that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupSize {
    /// A whole row.
    Channel,
    /// So many columns.
    Columns(u32),
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Channel => f.write_str("channel"),
            Self::Columns(columns) => write!(f, "{columns}"),
        }
    }
}

/// A group size that does not parse, or that no one wants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseGroupSizeError {
    /// Not a positive number, nor `channel`.
    #[error("`{text}` is not a group size: write a number of columns or channel")]
    Malformed {
        /// What was written.
        text: String,
    },
    /// A scale for every weight.
    #[error(
        "a group of 1 column has a scale for every weight, which takes more room than the weight \
         itself: write 2 or more columns or channel"
    )]
    OneColumn,
}

impl FromStr for GroupSize {
    type Err = ParseGroupSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.parse()) {
            ("channel", _) => Ok(Self::Channel),
            (_, Ok(1)) => Err(ParseGroupSizeError::OneColumn),
            (_, Ok(columns)) if columns > 0 => Ok(Self::Columns(columns)),
            _ => Err(ParseGroupSizeError::Malformed { text: text.to_owned() }),
        }
    }
}

/// What a rule says of layers that would be pruned or quantized: leave them, or do this instead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice<T> {
    /// `none`.
    Leave,
    /// Do this.
    Take(T),
}

impl<T: fmt::Display> fmt::Display for Choice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leave => f.write_str("none"),
            Self::Take(value) => value.fmt(f),
        }
    }
}

impl<T: FromStr> FromStr for Choice<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self::Leave) } else { text.parse().map(Self::Take) }
    }
}

/// Reads what is written as text; numbers may be written without quotes.
fn from_text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        Number(u32),
    }
    let text = match <Written as serde::Deserialize>::deserialize(deserializer)? {
        Written::Text(text) => text,
        Written::Number(number) => number.to_string(),
    };
    text.parse().map_err(serde::de::Error::custom)
}

/// Serde and schema of types that are written as text.
macro_rules! text_in_recipes {
    ([$($generics:tt)*], $type:ty, $name:literal, $description:literal) => {
        impl<$($generics)*> serde::Serialize for $type
        where
            $type: fmt::Display,
        {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de, $($generics)*> serde::Deserialize<'de> for $type
        where
            $type: FromStr<Err: fmt::Display>,
        {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                from_text(deserializer)
            }
        }

        impl<$($generics)*> schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": ["string", "integer"],
                    "description": $description
                })
            }
        }
    };
}

text_in_recipes!(
    [],
    Scheme,
    "Scheme",
    "int2 to int8, f8_e4m3, or a block type of GGUF files: q8_0, q6_k, q5_0, q5_k, q4_0, q4_k, q3_k, q2_k"
);
text_in_recipes!([], Candidate, "Candidate", "a pattern, a scheme, or both: 2:4, int4, 50% int4");
text_in_recipes!([], GroupSize, "GroupSize", "a number of columns, or channel");
text_in_recipes!([T], Choice<T>, "Choice", "none, or what to do instead");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_parse_what_they_print() {
        for text in ["int2", "int4", "int8", "f8_e4m3", "q8_0", "q4_0", "q4_k", "q2_k"] {
            assert_eq!(text.parse::<Scheme>().unwrap().to_string(), text);
        }
        assert_eq!("Q6_K".parse::<Scheme>().unwrap(), Scheme::Block(GgmlType::Q6_K));
        for text in ["int1", "int9", "int", "q4_1", "f16", "4"] {
            let error = text.parse::<Scheme>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("`{text}` is not a quantization scheme")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_group_is_a_number_or_the_whole_row() {
        assert_eq!("channel".parse(), Ok(GroupSize::Channel));
        assert_eq!("64".parse(), Ok(GroupSize::Columns(64)));
        for text in ["0", "-1", "row", ""] {
            let malformed = ParseGroupSizeError::Malformed { text: text.to_owned() };
            assert_eq!(text.parse::<GroupSize>(), Err(malformed));
        }
        assert_eq!("1".parse::<GroupSize>(), Err(ParseGroupSizeError::OneColumn));
        let parsed: Vec<GroupSize> = serde_json::from_str(r#"[32, "64", "channel"]"#).unwrap();
        assert_eq!(parsed, [GroupSize::Columns(32), GroupSize::Columns(64), GroupSize::Channel]);
    }

    #[test]
    fn none_is_a_choice() {
        assert_eq!("none".parse(), Ok(Choice::<Scheme>::Leave));
        assert_eq!("int3".parse(), Ok(Choice::Take(Scheme::Int(3))));
    }
}
