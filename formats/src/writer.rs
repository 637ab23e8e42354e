//! What every container's writer can do once its layout is fixed.

use std::{fmt, path::PathBuf};

use crate::{Digest, Result};

/// A finished file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Final path.
    pub path: PathBuf,
    /// Size.
    pub bytes: u64,
}

/// Takes the bytes of tensors whose names, types and sizes were declared when it was made.
///
/// Until [`finish`](Self::finish) there are only `*.part` files. Dropping a writer keeps them, so
/// that an interrupted run can be continued; [`abandon`](Self::abandon) removes them.
pub trait CheckpointWriter: fmt::Debug + Send {
    /// Appends bytes to component `component` of tensor `name`.
    ///
    /// Tensors are begun in any order. A container may ask that one is complete before the next is
    /// begun; components of one tensor may always be interleaved.
    ///
    /// # Errors
    /// [`FormatError::Io`](crate::FormatError::Io);
    /// [`FormatError::WrongLength`](crate::FormatError::WrongLength) for more bytes than declared;
    /// [`FormatError::TensorNotFound`](crate::FormatError::TensorNotFound). Nothing is counted as
    /// written then, except that a writer which gathers bytes may report that earlier ones could not
    /// be written.
    fn write(&mut self, name: &str, component: usize, chunk: &[u8]) -> Result<()>;

    /// Digests of the components of a tensor whose bytes are all written.
    ///
    /// # Errors
    /// [`FormatError::WrongLength`](crate::FormatError::WrongLength) when the tensor is not
    /// complete; [`FormatError::TensorNotFound`](crate::FormatError::TensorNotFound).
    fn digests(&mut self, name: &str) -> Result<Vec<Digest>>;

    /// Marks a tensor as written by the interrupted run, after comparing the bytes with `digests`.
    ///
    /// # Errors
    /// [`FormatError::Io`](crate::FormatError::Io);
    /// [`FormatError::InvalidTensor`](crate::FormatError::InvalidTensor) for a digest that differs,
    /// or when the tensor was begun in this run;
    /// [`FormatError::TensorNotFound`](crate::FormatError::TensorNotFound).
    fn adopt(&mut self, name: &str, digests: &[Digest]) -> Result<()>;

    /// Flushes to disk what was written so far.
    ///
    /// # Errors
    /// [`FormatError::Io`](crate::FormatError::Io).
    fn sync(&mut self) -> Result<()>;

    /// Checks that every tensor is complete, syncs and renames.
    ///
    /// # Errors
    /// [`FormatError::Io`](crate::FormatError::Io);
    /// [`FormatError::WrongLength`](crate::FormatError::WrongLength) for an incomplete tensor. The
    /// parts stay.
    fn finish(self: Box<Self>) -> Result<Vec<WrittenFile>>;

    /// Gives up and removes the parts.
    ///
    /// # Errors
    /// [`FormatError::Io`](crate::FormatError::Io) for the first part that could not be removed;
    /// the others are.
    fn abandon(self: Box<Self>) -> Result<()>;
}
