//! sparsepack
