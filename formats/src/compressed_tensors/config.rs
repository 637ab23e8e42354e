//! `quantization_config` of config.json, as far as it is about sparsity.

use std::path::Path;

use serde_json::{Value, json};

use crate::{DType, Encoding, FormatError, Result};

/// The release whose files are read and written.
const VERSION: &str = "0.14.0.1";

/// The value of `quant_method`.
pub(super) const METHOD: &str = "compressed-tensors";

/// How the weights of sparse modules are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SparseFormat {
    /// `sparse-24-bitmask`: [`Encoding::CtSparse24Bitmask`].
    Sparse24Bitmask,
    /// `sparse-bitmask`: [`Encoding::CtSparseBitmask`].
    SparseBitmask,
}

impl SparseFormat {
    /// The name in `sparsity_config.format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sparse24Bitmask => "sparse-24-bitmask",
            Self::SparseBitmask => "sparse-bitmask",
        }
    }

    /// The format that a configuration names; `None` when its weights are stored plainly (no
    /// `quantization_config`, one of another library, or no sparsity in it). `path` is the
    /// configuration's, for messages.
    ///
    /// # Errors
    /// [`FormatError::InvalidHeader`] for a sparse format that is not known.
    pub fn from_config(path: &Path, config: &Value) -> Result<Option<Self>> {
        let Some(quantization) = config.get("quantization_config") else { return Ok(None) };
        if quantization.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
            return Ok(None);
        }
        let Some(sparsity) = sparsity_config(quantization) else { return Ok(None) };
        let refuse =
            |what| Err(FormatError::InvalidHeader { path: path.to_owned(), offset: 0, what });
        match sparsity.get("format") {
            None => refuse("quantization_config.sparsity_config has no format".to_owned()),
            Some(Value::String(name)) => match name.as_str() {
                "dense" => Ok(None),
                "sparse-24-bitmask" => Ok(Some(Self::Sparse24Bitmask)),
                "sparse-bitmask" => Ok(Some(Self::SparseBitmask)),
                _ => refuse(format!(
                    "quantization_config.sparsity_config.format is `{name}`; expected dense, sparse-24-bitmask or sparse-bitmask"
                )),
            },
            Some(other) => refuse(format!(
                "quantization_config.sparsity_config.format is {other}; expected a string"
            )),
        }
    }

    /// The `quantization_config` of a model whose linears are stored in this format, but for `ignore`
    /// (module names), and of whose weights the share `global_sparsity` is zero.
    pub fn to_config(self, ignore: &[String], global_sparsity: f64) -> Value {
        let structure = match self {
            Self::Sparse24Bitmask => "2:4",
            Self::SparseBitmask => "unstructured",
        };
        json!({
            "quant_method": METHOD,
            "version": VERSION,
            "sparsity_config": {
                "format": self.name(),
                "targets": ["Linear"],
                "ignore": ignore,
                "global_sparsity": global_sparsity,
                "sparsity_structure": structure,
                "registry_requires_subclass": false,
            },
        })
    }

    /// The encoding of a weight of this type; `kept` is the number of values that are stored.
    pub fn encoding(self, dtype: DType, kept: u64) -> Encoding {
        match self {
            Self::Sparse24Bitmask => Encoding::CtSparse24Bitmask { dtype },
            Self::SparseBitmask => Encoding::CtSparseBitmask { dtype, kept },
        }
    }
}

fn sparsity_config(quantization: &Value) -> Option<&Value> {
    let sparsity = quantization.get("sparsity_config")?;
    sparsity
        .as_object()
        .is_none_or(|object| !object.is_empty())
        .then_some(sparsity)
        .filter(|sparsity| !sparsity.is_null())
}

/// Whether a `quantization_config` says that a model is quantized in a way that readers of this crate do
/// not look at: by another library, or its key-value cache. What compressed-tensors says of weights is
/// read, or refused, with the tensors.
pub fn is_foreign(quantization: &Value) -> bool {
    let absent = |key: &str| match quantization.get(key) {
        None | Some(Value::Null) => true,
        Some(value) => value.as_object().is_some_and(serde_json::Map::is_empty),
    };
    let about_weights = sparsity_config(quantization).is_some() || !absent("config_groups");
    let ours = quantization.get("quant_method").and_then(Value::as_str) == Some(METHOD);
    !(ours && about_weights && absent("kv_cache_scheme"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(quantization: &Value) -> Result<Option<SparseFormat>> {
        SparseFormat::from_config(
            Path::new("config.json"),
            &json!({"quantization_config": quantization}),
        )
    }

    #[test]
    fn what_is_written_is_read() {
        for format in [SparseFormat::Sparse24Bitmask, SparseFormat::SparseBitmask] {
            let config = format.to_config(&["lm_head".to_owned()], 0.5);
            assert_eq!(read(&config).unwrap(), Some(format));
            assert!(!is_foreign(&config));
        }
    }

    #[test]
    fn plain_weights_have_no_format() {
        let method = "compressed-tensors";
        for config in [
            json!(null),
            json!({"quant_method": "gptq", "sparsity_config": {"format": "x"}}),
            json!({"quant_method": method}),
            json!({"quant_method": method, "sparsity_config": {}}),
            json!({"quant_method": method, "sparsity_config": null}),
            json!({"quant_method": method, "sparsity_config": {"format": "dense"}}),
        ] {
            assert_eq!(read(&config).unwrap(), None, "{config}");
        }
        assert_eq!(SparseFormat::from_config(Path::new("x"), &json!({})).unwrap(), None);
    }

    #[test]
    fn what_other_libraries_quantized_is_foreign() {
        let mut config = SparseFormat::SparseBitmask.to_config(&[], 0.5);
        config["config_groups"] = json!({});
        assert!(!is_foreign(&config));
        config["config_groups"] = json!({"group_0": {}});
        assert!(!is_foreign(&config));
        config["kv_cache_scheme"] = json!({"num_bits": 8});
        assert!(is_foreign(&config));
        assert!(is_foreign(&json!({"quant_method": "gptq"})));
        assert!(is_foreign(&json!({"quant_method": "compressed-tensors"})));
    }

    #[test]
    fn unknown_formats_are_refused_by_name() {
        for (format, message) in [
            (
                json!({"format": "marlin-24"}),
                "config.json: offset 0: quantization_config.sparsity_config.format is `marlin-24`; expected dense, sparse-24-bitmask or sparse-bitmask",
            ),
            (
                json!({"format": 3}),
                "config.json: offset 0: quantization_config.sparsity_config.format is 3; expected a string",
            ),
            (
                json!({"targets": []}),
                "config.json: offset 0: quantization_config.sparsity_config has no format",
            ),
            (
                json!([1]),
                "config.json: offset 0: quantization_config.sparsity_config has no format",
            ),
        ] {
            let config = json!({"quant_method": "compressed-tensors", "sparsity_config": format});
            assert_eq!(read(&config).unwrap_err().to_string(), message);
        }
    }
}
