//! The residual stream that enters the first block.

use super::arch::Positions;
use super::error::{ModelError, Result};
use super::source::ModelSource;

/// Gathers the embeddings of one sequence, plus learned positions where the model has them.
///
/// Decodes only the rows it needs, each once and in stored order, so that a compressed table is
/// decompressed once at most.
///
/// # Shapes
/// `[ids.len(), hidden_size]`, row-major.
///
/// # Errors
/// [`ModelError::TokenOutOfRange`]; [`ModelError::SequenceTooLong`] for more tokens than learned
/// positions; data that does not decode.
pub fn embed(source: &ModelSource, ids: &[u32]) -> Result<Vec<f32>> {
    let (arch, config) = (source.arch(), source.config());
    let table = arch.embed.weight();
    if let Some(position) = ids.iter().position(|&id| id as usize >= config.vocab_size) {
        return Err(ModelError::TokenOutOfRange {
            token: ids[position],
            position,
            vocab_size: config.vocab_size,
        });
    }
    let width = config.hidden_size;
    let mut out = vec![0.0; ids.len() * width];
    let mut positions: Vec<usize> = (0..ids.len()).collect();
    positions.sort_by_key(|&position| ids[position]);
    for same in positions.chunk_by(|&a, &b| ids[a] == ids[b]) {
        let row = ids[same[0]] as usize;
        let values = source.read_rows_f32(&table, row..row + 1)?;
        for position in same {
            out[position * width..][..width].copy_from_slice(&values);
        }
    }
    if let (Some(positions), Positions::Learned { offset }) = (&arch.position_embed, arch.positions)
    {
        config.check_sequence(ids.len())?;
        let rows = source.read_rows_f32(&positions.weight(), offset..offset + ids.len())?;
        out.iter_mut().zip(rows).for_each(|(x, position)| *x += position);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn fixture(name: &str) -> (ModelSource, Vec<u32>, Vec<f32>) {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny");
        let source = ModelSource::open(&tiny.join(name)).unwrap();
        let directory = tiny.join(name.trim_end_matches(".gguf"));
        let bytes = std::fs::read(directory.join("golden.safetensors")).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ids = golden.tensor("input_ids").unwrap();
        let ids = ids.data().chunks_exact(8).map(|b| u32::from(b[0])).collect();
        let hidden = golden.tensor("hidden_0").unwrap();
        let hidden = hidden.data().chunks_exact(4);
        let hidden = hidden.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (source, ids, hidden)
    }

    #[test]
    fn embeddings_equal_the_reference_bit_by_bit() {
        for name in ["llama-gqa", "llama-mha-tied", "qwen2", "opt", "llama-gqa.gguf"] {
            let (source, ids, hidden) = fixture(name);
            assert_eq!(embed(&source, &ids).unwrap(), hidden, "{name}");
        }
    }

    #[test]
    fn foreign_tokens_and_long_sequences_are_refused() {
        let (source, _, _) = fixture("opt");
        assert_eq!(
            embed(&source, &[1, 96]).unwrap_err().to_string(),
            "token 96 at position 1 is outside the vocabulary of 96"
        );
        assert!(embed(&source, &[5; 64]).is_ok());
        assert_eq!(
            embed(&source, &[5; 65]).unwrap_err().to_string(),
            "a sequence of 65 tokens is longer than the model's 64 (max_position_embeddings)"
        );
    }
}
