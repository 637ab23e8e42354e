//! Selectors: which layers a recipe line is about.

use std::{fmt, ops::Range, str::FromStr};

use regex::Regex;

/// Matches layers by role, block, name or regular expression.
#[derive(Debug, Clone)]
pub enum Selector {
    /// `Linear`: every linear of the decoder blocks.
    AllLinears,
    /// `re:…`: a regular expression over the whole module name.
    Pattern(Regex),
    /// `blocks:0..8`: the linears of these decoder blocks.
    Blocks(BlockRange),
    /// A role (`down_proj`) or a whole module name (`model.layers.0.mlp.down_proj`).
    Name(String),
}

impl Selector {
    /// The default target of a recipe.
    pub fn all_linears() -> Vec<Self> {
        vec![Self::AllLinears]
    }

    /// Whether the matrix called `module` outside the decoder blocks (`lm_head`, the embeddings)
    /// is meant. It must be named: no general selector reaches it.
    pub fn names_table(&self, module: &str) -> bool {
        matches!(self, Self::Name(name) if name == module)
    }

    /// Whether the linear called `module`, with this role, of this decoder block is meant.
    pub fn matches(&self, module: &str, role: &str, block: usize) -> bool {
        match self {
            Self::AllLinears => true,
            Self::Pattern(regex) => regex.is_match(module),
            Self::Blocks(BlockRange(range)) => range.contains(&block),
            Self::Name(name) => name == role || name == module,
        }
    }
}

/// A selector or a range of blocks that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: {reason}")]
pub struct ParseSelectorError {
    text: String,
    kind: &'static str,
    reason: String,
}

impl FromStr for Selector {
    type Err = ParseSelectorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| ParseSelectorError { text: text.to_owned(), kind: "selector", reason };
        if text == "Linear" {
            return Ok(Self::AllLinears);
        }
        if let Some(pattern) = text.strip_prefix("re:") {
            // Anchored like compressed-tensors' targets, so that `re:.*q_proj` means a whole name.
            let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|e| fail(e.to_string()))?;
            return Ok(Self::Pattern(regex));
        }
        if let Some(range) = text.strip_prefix("blocks:") {
            let range: Result<BlockRange, ParseSelectorError> = range.parse();
            return range.map(Self::Blocks).map_err(|error| fail(error.reason));
        }
        if text.is_empty() {
            return Err(fail("it is empty".to_owned()));
        }
        Ok(Self::Name(text.to_owned()))
    }
}

/// Consecutive decoder blocks: `3`, or `0..8` with the end excluded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRange(pub Range<usize>);

impl FromStr for BlockRange {
    type Err = ParseSelectorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason: &str| ParseSelectorError {
            text: text.to_owned(),
            kind: "range of blocks",
            reason: reason.to_owned(),
        };
        let number = |part: &str| part.trim().parse::<usize>();
        let range = match text.split_once("..") {
            None => number(text).map(|block| block..block + 1),
            Some((start, end)) => number(start).and_then(|start| Ok(start..number(end)?)),
        };
        match range {
            Ok(range) if range.start < range.end => Ok(Self(range)),
            Ok(_) => Err(fail("the range is empty (the end is excluded)")),
            Err(_) => Err(fail("write a block number like 3 or a range like 0..8")),
        }
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.0.start, self.0.end)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllLinears => f.write_str("Linear"),
            Self::Pattern(regex) => {
                let text = regex.as_str();
                let inner = text.strip_prefix("^(?:").and_then(|text| text.strip_suffix(")$"));
                write!(f, "re:{}", inner.unwrap_or(text))
            }
            Self::Blocks(range) => write!(f, "blocks:{range}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

/// Serde and JSON schema of types that are written as their text.
macro_rules! as_text {
    ($type:ident, $description:literal) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(
                deserializer: D,
            ) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "description": $description })
            }
        }
    };
}

as_text!(
    Selector,
    "Linear, a role (down_proj), a module name, lm_head, re:PATTERN, or blocks:0..8"
);
as_text!(BlockRange, "decoder blocks, 3 or 0..8 with the end excluded");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_matches_what_it_says() {
        let module = "model.layers.3.mlp.down_proj";
        for (text, expected) in [
            ("Linear", true),
            ("down_proj", true),
            ("up_proj", false),
            (module, true),
            ("re:.*layers\\.[0-4]\\..*", true),
            ("re:down_proj", false),
            ("blocks:0..3", false),
            ("blocks:3", true),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.matches(module, "down_proj", 3), expected, "{text}");
            let again: Selector = selector.to_string().parse().unwrap();
            assert_eq!(again, selector);
        }
    }

    #[test]
    fn bad_selectors_say_why() {
        for text in ["re:(", "blocks:5..5", "blocks:x", ""] {
            let error = text.parse::<Selector>().unwrap_err().to_string();
            assert!(error.contains("is not a selector"), "{error}");
        }
    }
}
