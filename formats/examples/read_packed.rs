//! Prints shape, encoding and first row of one tensor of a checkpoint, packed or not:
//!
//! ```sh
//! cargo run -p sparsepack-formats --example read_packed -- CHECKPOINT TENSOR
//! ```

use std::{error::Error, io::Write, path::Path};

use sparsepack_formats::{encoding::MatrixShape, open};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [checkpoint, tensor] = &arguments[..] else {
        return Err("usage: read_packed CHECKPOINT TENSOR".into());
    };
    print_first_row(Path::new(checkpoint), tensor, &mut std::io::stdout())
}

/// Opens a checkpoint of any format and prints the tensor to `out`.
pub(crate) fn print_first_row(
    path: &Path,
    name: &str,
    out: &mut impl Write,
) -> Result<(), Box<dyn Error>> {
    let checkpoint = open(path)?;
    let info = checkpoint.tensors().get(name).ok_or("there is no such tensor")?;
    writeln!(out, "{name}: {:?}, {}, {} bytes", info.shape, info.encoding, info.stored_bytes)?;
    let MatrixShape { rows: 1.., cols } = MatrixShape::of(&info.shape) else {
        return Err("the tensor has no rows".into());
    };
    let mut row = vec![0.0; cols];
    checkpoint.read_rows_f32(name, 0..1, &mut row)?;
    writeln!(out, "{row:?}")?;
    Ok(())
}
