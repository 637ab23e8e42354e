//! What is on the device because the last call needed it too.

use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Result;

/// Something made from a key, kept until another key is asked for.
#[derive(Debug)]
pub(super) struct Cached<K, V>(Mutex<Option<(K, Arc<V>)>>);

impl<K, V> Default for Cached<K, V> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<K: PartialEq + Clone, V> Cached<K, V> {
    /// What belongs to `key`, made anew where the last key was another.
    pub(super) fn get(&self, key: &K, make: impl FnOnce() -> Result<V>) -> Result<Arc<V>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, value)) = &*kept
            && known == key
        {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(make()?);
        *kept = Some((key.clone(), Arc::clone(&value)));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_key_is_kept() {
        let cached = Cached::default();
        let mut made = 0;
        for key in ["a", "a", "b", "b", "a"] {
            let value = cached.get(&key, || {
                made += 1;
                Ok(key.len() + made)
            });
            value.unwrap();
        }
        assert_eq!(made, 3);
    }
}
