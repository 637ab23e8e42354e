//! A vocabulary as the tokenizer library has it.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::path::Path;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper};

use super::super::super::error::Result;
use super::{Pieces, SPACE, UNKNOWN, UNUSED, check_length, defect, is_symbol, runs_of_one, splits};

impl Pieces {
    /// The tokenizer, without what goes before or after a prompt.
    ///
    /// # Errors
    /// What [`check`](Self::check) refuses; scores that no order of merges expresses.
    pub(in super::super) fn tokenizer(&self, path: &Path) -> Result<tokenizers::Tokenizer> {
        let failed = |error: tokenizers::Error| super::super::defect(path, &error);
        self.check(path)?;
        let ids = self.index(path)?;
        let merges = self.merges(path, &ids)?;
        let mut vocab: Vocab = ids
            .iter()
            .filter(|&(_, &id)| self.types[id] != UNUSED)
            .map(|(&token, &id)| (token.to_owned(), id as u32))
            .collect();
        // An unused id stays out, unless llama.cpp comes to its text all the same.
        for (left, right) in &merges {
            let token = format!("{left}{right}");
            for part in [left.as_str(), right, &token] {
                if let Some(&id) = ids.get(part).filter(|_| !vocab.contains_key(part)) {
                    vocab.insert(part.to_owned(), id as u32);
                }
            }
        }
        let mut bpe =
            BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
        if let Some(id) = self.types.iter().position(|kind| *kind == UNKNOWN) {
            bpe = bpe.unk_token(self.tokens[id].clone());
        }
        let mut tokenizer = tokenizers::Tokenizer::new(bpe.build().map_err(failed)?);
        let space = SPACE.to_string();
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if self.space_prefix {
            steps.push(Prepend::new(space.clone()).into());
        }
        steps.push(Replace::new(" ", space.clone()).map_err(failed)?.into());
        tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(failed)?;
        let mut steps: Vec<DecoderWrapper> = vec![
            Replace::new(space, " ").map_err(failed)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
        ];
        if self.space_prefix {
            steps.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(Decoders::new(steps)));
        let tokens: Vec<&str> = self.tokens.iter().map(String::as_str).collect();
        super::super::add_tokens(&mut tokenizer, &tokens, &self.types).map_err(failed)?;
        Ok(tokenizer)
    }

    /// Every pair of tokens that together are a token, by falling score of that token. Runs of one
    /// character may share a score: the longest goes first, so that a run grows from the left.
    fn merges(&self, path: &Path, ids: &HashMap<&str, usize>) -> Result<Vec<(String, String)>> {
        let mut made = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            check_length(path, token)?;
            let mut pairs = Vec::new();
            for (left, right) in splits(token) {
                match (ids.contains_key(left), ids.contains_key(right)) {
                    (true, true) => pairs.push((left.to_owned(), right.to_owned())),
                    _ if is_symbol(left, ids) && is_symbol(right, ids) => {
                        let reason = format!("`{token}` is made of characters that have no token");
                        return Err(defect(path, reason));
                    }
                    _ => {}
                }
            }
            if !pairs.is_empty() {
                pairs.reverse();
                made.push((id, pairs));
            }
        }
        made.sort_by(|(a, _), (b, _)| {
            let length = self.tokens[*b].len().cmp(&self.tokens[*a].len());
            self.scores[*b].partial_cmp(&self.scores[*a]).unwrap_or(Ordering::Equal).then(length)
        });
        let undecided = |pair: &&[(usize, Vec<_>)]| {
            let (a, b) = (pair[0].0, pair[1].0);
            self.scores[a].partial_cmp(&self.scores[b]) == Some(Ordering::Equal)
                && !runs_of_one(&self.tokens[a], &self.tokens[b])
        };
        if let Some([(a, _), (b, _)]) = made.windows(2).find(undecided) {
            let (a, b, score) = (&self.tokens[*a], &self.tokens[*b], self.scores[*a]);
            let reason = format!(
                "`{a}` and `{b}` both have the score {score}, and no order of merges is that of \
                 llama.cpp"
            );
            return Err(defect(path, reason));
        }
        Ok(made.into_iter().flat_map(|(_, pairs)| pairs).collect())
    }
}
