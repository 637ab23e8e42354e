//! ggml's numbering of tensor types, as far as names for errors are concerned.

use crate::GgmlType;

/// Types that ggml knows and this crate does not read: ggml's `ggml_type` enum.
const UNREAD: [(u32, &str); 29] = [
    (4, "Q4_2, removed from ggml"),
    (5, "Q4_3, removed from ggml"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4, removed from ggml"),
    (32, "Q4_0_4_8, removed from ggml"),
    (33, "Q4_0_8_8, removed from ggml"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4, removed from ggml"),
    (37, "IQ4_NL_4_8, removed from ggml"),
    (38, "IQ4_NL_8_8, removed from ggml"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

/// What to call a type that is not a [`GgmlType`].
pub(super) fn describe_unread(id: u32) -> String {
    match UNREAD.iter().find(|(known, _)| *known == id) {
        Some((_, name)) => format!("{id} ({name})"),
        None => format!("{id} (unknown to this version)"),
    }
}

/// The types that are read, for the same error.
pub(super) fn supported() -> String {
    GgmlType::all().map(GgmlType::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_type_is_both_read_and_unread() {
        for (id, name) in UNREAD {
            assert_eq!(GgmlType::from_id(id), None, "{name}");
        }
    }
}
