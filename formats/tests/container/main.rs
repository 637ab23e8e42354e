//! The container of zstd frames: round trips, resuming, restored files, and everything that is refused.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests are test code too")]

mod builder;
mod malformed;
mod restore;
mod resume;
mod round_trip;
