//! Threads for work that is independent piece by piece: compression and decompression.

use std::{num::NonZero, sync::Mutex};

use sparsepack_formats::container::{ChunkJob, Executor};

use super::error::{PipelineError, Result};

/// A number of threads, started for each call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workers {
    threads: usize,
}

impl Workers {
    /// So many threads, or one a core.
    pub(super) fn new(threads: Option<usize>) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        Self { threads: threads.unwrap_or_else(cores).max(1) }
    }

    /// How many run at a time.
    pub(super) fn count(self) -> usize {
        self.threads
    }

    /// `act` of every item, in the order of the items.
    ///
    /// # Errors
    /// The error of the first item that has one.
    pub(super) fn map<T: Send + Sync, R: Send>(
        self,
        items: &[T],
        act: impl Fn(&T) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let results: Vec<Mutex<Option<Result<R>>>> =
            items.iter().map(|_| Mutex::new(None)).collect();
        let pairs: Vec<_> = items.iter().zip(&results).collect();
        self.each(pairs, |(item, result)| {
            if let Ok(mut result) = result.lock() {
                *result = Some(act(item));
            }
        });
        let died = || Err(PipelineError::Thread { name: "worker" });
        let taken = results.into_iter().map(|result| result.into_inner().ok().flatten());
        taken.map(|result| result.unwrap_or_else(died)).collect()
    }

    fn each<T: Send>(self, items: Vec<T>, act: impl Fn(T) + Sync) {
        let threads = self.threads.min(items.len());
        if threads < 2 {
            return items.into_iter().for_each(act);
        }
        let queue = Mutex::new(items.into_iter());
        let next = || queue.lock().ok()?.next();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(item) = next() {
                        act(item);
                    }
                });
            }
        });
    }
}

impl Executor for Workers {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, jobs: &mut [&mut ChunkJob]) {
        self.each(jobs.iter_mut().collect(), |job| job.run());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items_and_the_first_error_wins() {
        for threads in [1, 3, 64] {
            let workers = Workers::new(Some(threads));
            let items: Vec<usize> = (0..100).collect();
            let squares = workers.map(&items, |item| Ok(item * item)).unwrap();
            assert!(squares.iter().enumerate().all(|(index, square)| *square == index * index));
            let error = workers.map(&items, |&item| match item {
                7 => Err(PipelineError::Thread { name: "seven" }),
                70 => Err(PipelineError::Thread { name: "seventy" }),
                _ => Ok(()),
            });
            assert_eq!(error.unwrap_err().to_string(), "the seven thread panicked");
        }
    }
}
