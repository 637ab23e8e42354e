use super::*;
use crate::DType;

const METHOD: &str = "compressed-tensors";

fn grid(bits: u8, group_size: Option<u32>, symmetric: bool) -> IntGrid {
    IntGrid { bits, group_size, symmetric, scale: DType::Bf16 }
}

fn modules(all: &[(&str, Encoding)]) -> Vec<(String, Encoding)> {
    all.iter().map(|(name, encoding)| ((*name).to_owned(), *encoding)).collect()
}

fn read(quantization: &Value) -> Result<Option<Schemes>> {
    let config = json!({ "quantization_config": quantization });
    Schemes::from_config(Path::new("config.json"), &config)
}

/// A configuration of one group, of which `change` changes something.
fn message(change: impl FnOnce(&mut Value)) -> String {
    let pack = Encoding::CtPackQuantized { grid: grid(4, Some(128), true) };
    let mut config = quantization_config(&modules(&[("m", pack)]), &[]).unwrap().unwrap();
    change(&mut config);
    read(&config).unwrap_err().to_string()
}

#[test]
fn one_scheme_is_for_every_linear() {
    let pack = Encoding::CtPackQuantized { grid: grid(4, Some(128), true) };
    let config = quantization_config(
        &modules(&[("layers.0.up", pack), ("layers.1.up", pack)]),
        &["lm_head".to_owned()],
    );
    assert_eq!(
        config.unwrap().unwrap(),
        json!({
            "quant_method": "compressed-tensors",
            "version": "0.20.0",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "weights": {
                        "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                        "dynamic": false, "group_size": 128,
                    },
                    "input_activations": null,
                    "output_activations": null,
                },
            },
            "ignore": ["lm_head"],
        })
    );
    assert_eq!(quantization_config(&[], &[]).unwrap(), None);
}

#[test]
fn several_schemes_name_their_modules_and_are_read_back() {
    let all = modules(&[
        ("a", Encoding::CtPackQuantized { grid: grid(3, Some(64), false) }),
        ("b", Encoding::CtIntQuantized { grid: grid(8, None, true) }),
        ("c", Encoding::CtFloatQuantized { scale: DType::Bf16 }),
        // Another type of scales is the same scheme: the type is that of the stored scales.
        ("d", Encoding::CtFloatQuantized { scale: DType::F32 }),
    ]);
    let config = quantization_config(&all, &["e".to_owned()]).unwrap().unwrap();
    assert_eq!(config["format"], "mixed-precision");
    assert_eq!(config["config_groups"]["group_2"]["targets"], json!(["c", "d"]));
    let schemes = read(&config).unwrap().unwrap();
    for (module, encoding) in &all {
        assert_eq!(schemes.of(module).unwrap(), Scheme::of(module, *encoding).unwrap());
    }
    let mut named: Vec<&str> = schemes.named().collect();
    named.sort_unstable();
    assert_eq!(named, ["a", "b", "c", "d"]);
    assert_eq!(
        schemes.of("e").unwrap_err(),
        "belongs to a module that quantization_config.ignore lists"
    );
    assert_eq!(
        schemes.of("f").unwrap_err(),
        "belongs to a module that no target of quantization_config.config_groups is for"
    );
}

#[test]
fn only_quantized_formats_have_a_configuration() {
    let encoding = Encoding::Dense { dtype: DType::F16 };
    let error = quantization_config(&modules(&[("m", encoding)]), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `m`: the encoding F16 is not one of compressed-tensors' quantized formats"
    );
}

#[test]
fn names_come_before_expressions_and_those_before_the_class() {
    let group = |targets: Value, bits: u8| json!({ "targets": targets, "weights": { "num_bits": bits, "strategy": "channel" } });
    let schemes = read(&json!({
        "quant_method": METHOD, "quantization_status": "compressed", "format": "pack-quantized",
        "config_groups": {
            "a": group(json!(["Linear"]), 2),
            "b": group(json!(["re:.*z", "re:layers\\.\\d+\\.m"]), 3),
            "c": group(json!(["layers.1.m"]), 4),
            "d": group(json!(["re:.*up|.*down"]), 5),
        },
        "ignore": ["re:.*head", "layers.9.m"],
    }))
    .unwrap()
    .unwrap();
    let bits = |module: &str| schemes.of(module).map(|scheme| scheme.bits).unwrap_or_default();
    assert_eq!(bits("layers.0.other"), 2);
    // Expressions match from the start, not to the end, and the first in the order of text counts.
    assert_eq!(bits("layers.12.mlp"), 3);
    assert_eq!(bits("model.layers.12.m"), 2);
    assert_eq!(bits("up.z"), 5);
    assert_eq!(bits("layers.1.m"), 4);
    assert_eq!((bits("lm_head"), bits("layers.9.m")), (0, 0));
}

#[test]
fn what_is_not_about_quantized_weights_is_left_alone() {
    for quantization in [
        json!(null),
        json!({ "quant_method": "gptq", "config_groups": { "a": {} } }),
        json!({ "quant_method": METHOD }),
        json!({ "quant_method": METHOD, "config_groups": {} }),
        json!({ "quant_method": METHOD, "config_groups": null }),
    ] {
        assert!(read(&quantization).unwrap().is_none(), "{quantization}");
    }
}

const AT: &str = "config.json: offset 0: quantization_config";

#[test]
fn configurations_that_are_not_read_are_refused_by_name() {
    let at = AT;
    for (found, expected) in [
        (
            message(|config| config["quantization_status"] = json!("frozen")),
            format!("{at}.quantization_status is frozen; expected compressed"),
        ),
        (
            message(|config| config["quantization_status"] = json!(null)),
            format!("{at}.quantization_status is not there; expected compressed"),
        ),
        (
            message(|config| config["kv_cache_scheme"] = json!({ "num_bits": 8 })),
            format!("{at}.kv_cache_scheme is not supported; expected none"),
        ),
        (
            message(|config| config["transform_config"] = json!({ "config_groups": {} })),
            format!("{at}.transform_config is not supported; expected none"),
        ),
        (
            message(|config| config["sparsity_config"] = json!({ "format": "sparse-bitmask" })),
            format!("{at} has both config_groups and sparsity_config; expected one"),
        ),
        (
            message(|config| config["ignore"] = json!(["re:(?!x)"])),
            format!("{at} has the expression `re:(?!x)`, which is not supported"),
        ),
        (
            message(|config| config["ignore"] = json!(3)),
            format!("{at}: invalid type: integer `3`, expected a sequence"),
        ),
        (
            message(|config| {
                config["config_groups"]["group_1"] = config["config_groups"]["group_0"].clone();
            }),
            format!("{at}.config_groups has the target `Linear` twice"),
        ),
        (
            message(|config| config["config_groups"] = json!({ "W4A16": ["Linear"] })),
            format!("{at}.config_groups.W4A16 is not an object; presets are not supported"),
        ),
    ] {
        assert_eq!(found, expected);
    }
}

#[test]
fn groups_that_are_not_read_are_refused_by_name() {
    let group = |change: fn(&mut Value)| {
        message(move |config| change(&mut config["config_groups"]["group_0"]))
    };
    let within = format!("{AT}.config_groups.group_0");
    for (found, expected) in [
        (
            group(|group| group["input_activations"] = json!({ "num_bits": 8 })),
            format!("{within}.input_activations is not supported; expected weights alone"),
        ),
        (
            group(|group| group["output_activations"] = json!({ "num_bits": 8 })),
            format!("{within}.output_activations is not supported; expected weights alone"),
        ),
        (group(|group| group["weights"] = json!(null)), format!("{within}.weights is not there")),
        (
            group(|group| group["weights"]["type"] = json!("binary")),
            format!("{within}.weights.type is binary; expected int or float"),
        ),
        (
            group(|group| group["format"] = json!("marlin-24")),
            format!(
                "{within}.format is marlin-24 for weights of type int; expected pack-quantized or int-quantized for int, float-quantized for float"
            ),
        ),
        (
            group(|group| group["weights"]["num_bits"] = json!(9)),
            format!("{within}.weights.num_bits is 9; expected 2 to 8"),
        ),
        (
            group(|group| group["format"] = json!("int-quantized")),
            format!("{within}.weights.num_bits is 4; expected 8"),
        ),
        (
            group(|group| group["weights"]["strategy"] = json!("tensor")),
            format!(
                "{within}.weights.strategy is tensor with group_size 128; expected channel, or group with its columns"
            ),
        ),
        (
            group(|group| group["weights"]["group_size"] = json!(0)),
            format!(
                "{within}.weights.strategy is group with group_size 0; expected channel, or group with its columns"
            ),
        ),
        (
            group(|group| group["weights"]["group_size"] = json!(1i64 << 33)),
            format!("{within}.weights.group_size is 8589934592; expected columns"),
        ),
        (
            group(|group| group["weights"]["dynamic"] = json!("local")),
            format!("{within}.weights.dynamic is set; expected false"),
        ),
        (
            group(|group| group["weights"]["actorder"] = json!("group")),
            format!("{within}.weights.actorder is \"group\"; expected none or weight"),
        ),
        (
            group(|group| {
                group["format"] = json!("naive-quantized");
                group["weights"]["type"] = json!("FLOAT");
                group["weights"]["num_bits"] = json!(8);
            }),
            format!("{within}.weights.strategy of floats; expected channel, symmetric"),
        ),
    ] {
        assert_eq!(found, expected);
    }
}
