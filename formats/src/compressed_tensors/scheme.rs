//! `quantization_config` of config.json, as far as it is about quantized weights.
//!
//! ```text
//! "quantization_config": { "quant_method": "compressed-tensors", "version": "0.20.0",
//!   "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
//!   "config_groups": { "group_0": { "targets": ["Linear"], "format": "pack-quantized",
//!     "weights": { "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
//!                  "group_size": 128, "dynamic": false },
//!     "input_activations": null, "output_activations": null } } }
//! ```
//!
//! A target is a module's name, `re:` and a regular expression that matches from the start of one, or
//! the class `Linear`, which is every quantized module here: classes are not told by a checkpoint. Names
//! come before expressions (in the order of their text) and those before the class, as in the
//! `match_targets` of compressed-tensors.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::config::METHOD;
use crate::{Encoding, FormatError, IntGrid, Result};

/// The release whose files are written.
const VERSION: &str = "0.20.0";

/// The target that is a class.
const LINEAR: &str = "Linear";

/// What stands before a regular expression.
const EXPRESSION: &str = "re:";

/// How codes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Storage {
    /// `pack-quantized`.
    Pack,
    /// `int-quantized`, or `naive-quantized` integers.
    Int,
    /// `float-quantized`, or `naive-quantized` floats.
    Float,
}

/// How the weights of some modules are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) storage: Storage,
    pub(super) bits: u8,
    /// Columns of a group; none where a row has one scale.
    pub(super) group_size: Option<u32>,
    pub(super) symmetric: bool,
}

/// How the weights of each module are quantized.
#[derive(Debug)]
pub(crate) struct Schemes {
    names: HashMap<String, Scheme>,
    expressions: Vec<(Regex, Scheme)>,
    linear: Option<Scheme>,
    ignored: HashSet<String>,
    ignored_expressions: Vec<Regex>,
}

#[derive(Deserialize)]
struct Configuration {
    config_groups: BTreeMap<String, Value>,
    format: Option<String>,
    quantization_status: Option<String>,
    ignore: Option<Vec<String>>,
    kv_cache_scheme: Option<Value>,
    transform_config: Option<Value>,
    sparsity_config: Option<Value>,
}

#[derive(Deserialize)]
struct Group {
    targets: Vec<String>,
    weights: Option<Weights>,
    input_activations: Option<Value>,
    output_activations: Option<Value>,
    format: Option<String>,
}

#[derive(Deserialize)]
struct Weights {
    #[serde(default = "eight")]
    num_bits: u64,
    #[serde(rename = "type", default = "int")]
    kind: String,
    #[serde(default = "yes")]
    symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    dynamic: Option<Value>,
    actorder: Option<Value>,
}

fn eight() -> u64 {
    8
}

fn int() -> String {
    "int".to_owned()
}

fn yes() -> bool {
    true
}

impl Schemes {
    /// What a configuration says; `None` when its weights are not quantized by compressed-tensors.
    /// `path` is the configuration's, for messages.
    ///
    /// # Errors
    /// [`FormatError::InvalidHeader`] for a quantization that this crate does not read, by name.
    pub(crate) fn from_config(path: &Path, config: &Value) -> Result<Option<Self>> {
        let Some(quantization) = config.get("quantization_config") else { return Ok(None) };
        if quantization.get("quant_method").and_then(Value::as_str) != Some(METHOD)
            || is_absent(quantization.get("config_groups"))
        {
            return Ok(None);
        }
        Self::parse(quantization).map(Some).map_err(|what| FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: 0,
            what: format!("quantization_config{what}"),
        })
    }

    fn parse(quantization: &Value) -> std::result::Result<Self, String> {
        let config =
            Configuration::deserialize(quantization).map_err(|error| format!(": {error}"))?;
        if config.quantization_status.as_deref() != Some("compressed") {
            let found = config.quantization_status.as_deref().unwrap_or("not there");
            return Err(format!(".quantization_status is {found}; expected compressed"));
        }
        let sparsity = config.sparsity_config.as_ref();
        let format = sparsity.and_then(|sparsity| sparsity.get("format")).and_then(Value::as_str);
        if !is_absent(sparsity) && format != Some("dense") {
            return Err(" has both config_groups and sparsity_config; expected one".to_owned());
        }
        for (key, value) in [
            ("kv_cache_scheme", &config.kv_cache_scheme),
            ("transform_config", &config.transform_config),
        ] {
            if !is_absent(value.as_ref()) {
                return Err(format!(".{key} is not supported; expected none"));
            }
        }
        let mut schemes = Self {
            names: HashMap::new(),
            expressions: vec![],
            linear: None,
            ignored: HashSet::new(),
            ignored_expressions: vec![],
        };
        let mut expressions = BTreeMap::new();
        for (name, group) in &config.config_groups {
            let within = |what: String| format!(".config_groups.{name}{what}");
            if !group.is_object() {
                return Err(within(" is not an object; presets are not supported".to_owned()));
            }
            let group = Group::deserialize(group).map_err(|error| within(format!(": {error}")))?;
            let scheme = group.scheme(config.format.as_deref()).map_err(within)?;
            for target in group.targets {
                let before = match target.strip_prefix(EXPRESSION) {
                    Some(text) => expressions.insert(text.to_owned(), scheme),
                    None if target == LINEAR => schemes.linear.replace(scheme),
                    None => schemes.names.insert(target.clone(), scheme),
                };
                if before.is_some() {
                    return Err(format!(".config_groups has the target `{target}` twice"));
                }
            }
        }
        for (text, scheme) in expressions {
            schemes.expressions.push((expression(&text)?, scheme));
        }
        for ignored in config.ignore.unwrap_or_default() {
            match ignored.strip_prefix(EXPRESSION) {
                Some(text) => schemes.ignored_expressions.push(expression(text)?),
                None => drop(schemes.ignored.insert(ignored)),
            }
        }
        Ok(schemes)
    }

    /// How the weight of a module is quantized, or why that is not said.
    pub(super) fn of(&self, module: &str) -> std::result::Result<Scheme, String> {
        let ignored = self.ignored.contains(module)
            || self.ignored.contains(LINEAR)
            || self.ignored_expressions.iter().any(|expression| expression.is_match(module));
        if ignored {
            return Err("belongs to a module that quantization_config.ignore lists".to_owned());
        }
        let by_expression = || {
            let mut all = self.expressions.iter();
            all.find(|(expression, _)| expression.is_match(module)).map(|(_, scheme)| *scheme)
        };
        let scheme = self.names.get(module).copied().or_else(by_expression).or(self.linear);
        scheme.ok_or_else(|| {
            "belongs to a module that no target of quantization_config.config_groups is for"
                .to_owned()
        })
    }

    /// The modules that targets name.
    pub(super) fn named(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }
}

impl Group {
    /// `format` is that of the whole configuration, which counts where the group has none.
    fn scheme(&self, format: Option<&str>) -> std::result::Result<Scheme, String> {
        for (key, value) in [
            ("input_activations", &self.input_activations),
            ("output_activations", &self.output_activations),
        ] {
            if !is_absent(value.as_ref()) {
                return Err(format!(".{key} is not supported; expected weights alone"));
            }
        }
        let Some(weights) = &self.weights else {
            return Err(".weights is not there".to_owned());
        };
        let float = match weights.kind.to_ascii_lowercase().as_str() {
            "int" => false,
            "float" => true,
            kind => return Err(format!(".weights.type is {kind}; expected int or float")),
        };
        let storage = match (self.format.as_deref().or(format), float) {
            (Some("pack-quantized"), false) => Storage::Pack,
            (Some("int-quantized" | "naive-quantized"), false) => Storage::Int,
            (Some("float-quantized" | "naive-quantized"), true) => Storage::Float,
            (found, _) => {
                return Err(format!(
                    ".format is {} for weights of type {}; expected pack-quantized or int-quantized for int, float-quantized for float",
                    found.unwrap_or("not there"),
                    weights.kind
                ));
            }
        };
        weights.scheme(storage)
    }
}

impl Weights {
    fn scheme(&self, storage: Storage) -> std::result::Result<Scheme, String> {
        let refuse = |what: String| Err(format!(".weights.{what}"));
        let bits = match (storage, self.num_bits) {
            (Storage::Pack, 2..=8) | (_, 8) => self.num_bits as u8,
            (Storage::Pack, bits) => return refuse(format!("num_bits is {bits}; expected 2 to 8")),
            (_, bits) => return refuse(format!("num_bits is {bits}; expected 8")),
        };
        let group_size = match (self.strategy.as_deref(), self.group_size) {
            (Some("channel"), None | Some(-1)) | (None, Some(-1)) => None,
            (Some("group") | None, Some(size @ 1..)) => match u32::try_from(size) {
                Ok(size) => Some(size),
                Err(_) => return refuse(format!("group_size is {size}; expected columns")),
            },
            (strategy, size) => {
                let strategy = strategy.unwrap_or("not there");
                let size = size.map_or("none".to_owned(), |size| size.to_string());
                return refuse(format!(
                    "strategy is {strategy} with group_size {size}; expected channel, or group with its columns"
                ));
            }
        };
        if storage == Storage::Float && (group_size.is_some() || !self.symmetric) {
            return refuse("strategy of floats; expected channel, symmetric".to_owned());
        }
        if self.dynamic.as_ref().is_some_and(|dynamic| *dynamic != Value::Bool(false)) {
            return refuse("dynamic is set; expected false".to_owned());
        }
        match &self.actorder {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::String(order)) if order == "weight" || order == "static" => {}
            Some(order) => return refuse(format!("actorder is {order}; expected none or weight")),
        }
        Ok(Scheme { storage, bits, group_size, symmetric: self.symmetric })
    }
}

impl Scheme {
    fn of(name: &str, encoding: Encoding) -> Result<Self> {
        let of_grid = |storage, IntGrid { bits, group_size, symmetric, .. }| Self {
            storage,
            bits,
            group_size,
            symmetric,
        };
        Ok(match encoding {
            Encoding::CtPackQuantized { grid } => of_grid(Storage::Pack, grid),
            Encoding::CtIntQuantized { grid } => of_grid(Storage::Int, grid),
            Encoding::CtFloatQuantized { .. } => {
                Self { storage: Storage::Float, bits: 8, group_size: None, symmetric: true }
            }
            _ => {
                return Err(FormatError::Encoding {
                    name: name.to_owned(),
                    what: format!(
                        "the encoding {encoding} is not one of compressed-tensors' quantized formats"
                    ),
                });
            }
        })
    }

    fn format(self) -> &'static str {
        match self.storage {
            Storage::Pack => "pack-quantized",
            Storage::Int => "int-quantized",
            Storage::Float => "float-quantized",
        }
    }

    fn to_group(self, targets: &[&str]) -> Value {
        let mut weights = json!({
            "num_bits": self.bits,
            "type": if self.storage == Storage::Float { "float" } else { "int" },
            "symmetric": self.symmetric,
            "strategy": if self.group_size.is_some() { "group" } else { "channel" },
            "dynamic": false,
        });
        if let Some(size) = self.group_size {
            weights["group_size"] = json!(size);
        }
        json!({
            "targets": targets,
            "format": self.format(),
            "weights": weights,
            "input_activations": null,
            "output_activations": null,
        })
    }
}

/// The `quantization_config` of a model whose modules (`MODULE` of `MODULE.weight`) are stored so, for
/// current releases of compressed-tensors; `None` where there are none. `ignore` lists every other
/// linear, an output matrix that is tied to the embeddings too.
///
/// One group is for every `Linear`; of several, each names its modules, since loaders that fuse modules
/// do not agree on which of a class and a name comes first.
///
/// # Errors
/// [`FormatError::Encoding`] for an encoding that is not one of [`Encoding::CtPackQuantized`],
/// [`Encoding::CtIntQuantized`] and [`Encoding::CtFloatQuantized`].
pub fn quantization_config(
    modules: &[(String, Encoding)],
    ignore: &[String],
) -> Result<Option<Value>> {
    let mut groups: Vec<(Scheme, Vec<&str>)> = vec![];
    for (module, encoding) in modules {
        let scheme = Scheme::of(module, *encoding)?;
        match groups.iter_mut().find(|(other, _)| *other == scheme) {
            Some((_, names)) => names.push(module),
            None => groups.push((scheme, vec![module])),
        }
    }
    let Some((first, _)) = groups.first() else { return Ok(None) };
    let same = groups.iter().all(|(scheme, _)| scheme.format() == first.format());
    let format = if same { first.format() } else { "mixed-precision" };
    let several = groups.len() > 1;
    let config_groups: serde_json::Map<_, _> = groups
        .iter()
        .enumerate()
        .map(|(index, (scheme, names))| {
            let targets = if several { names.as_slice() } else { &[LINEAR] };
            (format!("group_{index}"), scheme.to_group(targets))
        })
        .collect();
    Ok(Some(json!({
        "quant_method": METHOD,
        "version": VERSION,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignore,
    })))
}

/// Python's `re.match`: from the start of a name, not to its end.
fn expression(text: &str) -> std::result::Result<Regex, String> {
    Regex::new(&format!("^(?:{text})"))
        .map_err(|_| format!(" has the expression `{EXPRESSION}{text}`, which is not supported"))
}

fn is_absent(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(value) => value.as_object().is_some_and(serde_json::Map::is_empty),
    }
}

#[cfg(test)]
mod tests;
