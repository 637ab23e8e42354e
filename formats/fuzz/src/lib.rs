//! What the fuzz targets share: encodings and shapes out of random bytes, safetensors files made of
//! them, and the two things that must hold of every checkpoint that opens.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use arbitrary::{Arbitrary, Result, Unstructured};
use sparsepack_formats::{
    CheckpointReader, DType, Encoder, Encoding, GgmlType, IntGrid, Kept, QuantizedRows,
    encoding::MatrixShape,
};
use tempfile::TempDir;

/// Most bytes of a tensor that a target makes up: decoding may give 32 times as many.
const MAX_TENSOR_BYTES: u64 = 1 << 16;

/// Readers map files, so inputs become files, in memory where the system has such a place.
pub struct Scratch(TempDir);

impl Scratch {
    /// An empty directory that goes away with the value.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self(made.expect("a temporary directory"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Puts a file into the directory.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, bytes).expect("a file in the temporary directory");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Any encoding, also ones that hold no shape at all.
pub fn encoding(u: &mut Unstructured<'_>) -> Result<Encoding> {
    let dtype = u.choose_iter(DType::ALL)?;
    let types: Vec<GgmlType> = GgmlType::all().collect();
    Ok(match u.int_in_range(0..=11)? {
        0 => Encoding::Dense { dtype },
        1 => Encoding::Sparse24 { dtype },
        2 => Encoding::Nm { n: u.int_in_range(0..=17)?, m: u.int_in_range(0..=17)?, dtype },
        3 => Encoding::Bitmask { dtype, kept: u.int_in_range(0..=300)? },
        4 => Encoding::TorchCutlass { dtype },
        5 => Encoding::CtSparse24Bitmask { dtype },
        6 => Encoding::CtSparseBitmask { dtype, kept: u.int_in_range(0..=300)? },
        7 => Encoding::Int { grid: grid(u)?, kept: kept(u)? },
        8 => Encoding::CtPackQuantized { grid: grid(u)? },
        9 => Encoding::CtIntQuantized { grid: IntGrid { bits: 8, ..grid(u)? } },
        10 => Encoding::CtFloatQuantized { scale: dtype },
        _ => Encoding::Ggml { ty: *u.choose(&types)? },
    })
}

/// A grid, mostly one that there is.
fn grid(u: &mut Unstructured<'_>) -> Result<IntGrid> {
    let scale = if u.ratio(7, 8)? {
        *u.choose(&[DType::F16, DType::Bf16, DType::F32])?
    } else {
        u.choose_iter(DType::ALL)?
    };
    Ok(IntGrid {
        bits: u.int_in_range(1..=9)?,
        group_size: *u.choose(&[None, Some(1), Some(4), Some(32), Some(0), Some(7)])?,
        symmetric: u.arbitrary()?,
        scale,
    })
}

fn kept(u: &mut Unstructured<'_>) -> Result<Kept> {
    Ok(match u.int_in_range(0..=3)? {
        0 => Kept::All,
        1 => Kept::Sparse24,
        2 => Kept::Nm { n: u.int_in_range(0..=17)?, m: u.int_in_range(0..=17)? },
        _ => Kept::Bitmask { kept: u.int_in_range(0..=300)? },
    })
}

/// A shape that is mostly small and often a whole number of groups and blocks; sometimes anything.
pub fn shape(u: &mut Unstructured<'_>) -> Result<Vec<usize>> {
    if u.ratio(1, 8)? {
        return u.arbitrary();
    }
    let mut shape: Vec<usize> =
        (0..u.int_in_range(0..=2)?).map(|_| u.int_in_range(0..=9)).collect::<Result<_>>()?;
    let unit = *u.choose(&[1, 4, 8, 32, 64, 256])?;
    shape.push(unit * u.int_in_range(0..=9)?);
    if u.ratio(1, 8)? && shape.len() == 2 {
        // The least that torch-cutlass takes.
        shape = vec![32, 64 * u.int_in_range(1..=2)?];
    }
    Ok(shape)
}

/// Bytes of the components of a tensor, all as long as they should be, and made by encoding some values
/// where those fit; `None` for a tensor that does not exist or is too large to make up.
pub fn parts(
    u: &mut Unstructured<'_>,
    name: &str,
    encoding: Encoding,
    shape: &[usize],
) -> Result<Option<Vec<Vec<u8>>>> {
    let Ok(components) = encoding.components(name, shape) else { return Ok(None) };
    if encoding.is_quantized() && u.ratio(3, 4)? {
        return Ok(quantized(u, name, encoding, shape)?.and_then(std::result::Result::ok));
    }
    if u.arbitrary()? {
        let Some(dense) = dense(u, encoding, shape)? else { return Ok(None) };
        if let Ok(parts) = encode(name, encoding, shape, &dense, dense.len()) {
            return Ok(Some(parts));
        }
    }
    let mut all = vec![];
    for component in components {
        if component.bytes > MAX_TENSOR_BYTES {
            return Ok(None);
        }
        all.push(fill(u, component.bytes as usize)?);
    }
    Ok(Some(all))
}

/// The components of a quantized tensor of any codes, some rows at a time, or why there are none. Codes of
/// few bits, most of them zero points, so that sparse layouts have something to hold; `None` when there
/// would be too many.
pub fn quantized(
    u: &mut Unstructured<'_>,
    name: &str,
    encoding: Encoding,
    shape: &[usize],
) -> Result<Option<sparsepack_formats::Result<Vec<Vec<u8>>>>> {
    let (Ok(components), &[rows, cols]) = (encoding.components(name, shape), shape) else {
        return Ok(None);
    };
    if rows.checked_mul(cols).is_none_or(|elements| elements as u64 > MAX_TENSOR_BYTES) {
        return Ok(None);
    }
    let grid = match encoding {
        Encoding::Int { grid, .. }
        | Encoding::CtPackQuantized { grid }
        | Encoding::CtIntQuantized { grid } => grid,
        _ => IntGrid { bits: 8, group_size: None, symmetric: true, scale: DType::F16 },
    };
    let Ok(groups) = grid.groups(name, cols) else { return Ok(None) };
    let code = |byte: u8| byte.cast_signed() >> (8 - grid.bits);
    let points: Vec<i8> = match grid.symmetric {
        true => vec![],
        false => fill(u, rows * groups)?.into_iter().map(code).collect(),
    };
    let (mask, period) = (u.arbitrary::<u32>()?, u.int_in_range(1..=32)?);
    let drawn = fill(u, rows * cols)?.into_iter().enumerate();
    let codes: Vec<i8> = drawn
        .map(|(index, byte)| match mask >> (index % period) & 1 {
            0 => points.get(index / (cols / groups)).copied().unwrap_or(0),
            _ => code(byte),
        })
        .collect();
    let scales: Vec<f32> =
        fill(u, rows * groups)?.into_iter().map(|byte| f32::from(byte) / 16.0).collect();
    let at_once = u.int_in_range(1..=5)?;
    Ok(Some((|| {
        let mut encoder = Encoder::new(encoding, name, shape)?;
        let mut parts = vec![vec![]; components.len()];
        for start in (0..rows).step_by(at_once) {
            let end = rows.min(start + at_once);
            let more = encoder.quantized_rows(QuantizedRows {
                codes: &codes[start * cols..end * cols],
                scales: &scales[start * groups..end * groups],
                zero_points: match points.as_slice() {
                    [] => &[],
                    points => &points[start * groups..end * groups],
                },
            })?;
            parts.iter_mut().zip(more).for_each(|(part, more)| part.extend(more));
        }
        parts.iter_mut().zip(encoder.finish()?).for_each(|(part, more)| part.extend(more));
        for (component, part) in components.iter().zip(&parts) {
            assert_eq!(component.bytes, part.len() as u64, "{encoding} {}", component.suffix);
        }
        Ok(parts)
    })()))
}

/// Values of a tensor, some of them zero by a mask of one to 32 elements, so that sparse encodings have
/// something to hold; `None` when they would be too many.
pub fn dense(
    u: &mut Unstructured<'_>,
    encoding: Encoding,
    shape: &[usize],
) -> Result<Option<Vec<u8>>> {
    let width = encoding.value_dtype().size_bytes();
    let MatrixShape { rows, cols } = MatrixShape::of(shape);
    let bytes = rows.checked_mul(cols).and_then(|elements| elements.checked_mul(width));
    let Some(bytes) = bytes.filter(|&bytes| bytes as u64 <= MAX_TENSOR_BYTES) else {
        return Ok(None);
    };
    let mut dense = fill(u, bytes)?;
    let mask: u32 = u.arbitrary()?;
    let period = u.int_in_range(1..=32)?;
    for (index, element) in dense.chunks_mut(width).enumerate() {
        if mask >> (index % period) & 1 == 0 {
            element.fill(0);
        }
    }
    Ok(Some(dense))
}

/// The components of a tensor, encoded `bytes_at_once`.
pub fn encode(
    name: &str,
    encoding: Encoding,
    shape: &[usize],
    dense: &[u8],
    bytes_at_once: usize,
) -> sparsepack_formats::Result<Vec<Vec<u8>>> {
    let mut parts = vec![vec![]; encoding.components(name, shape)?.len()];
    let mut encoder = Encoder::new(encoding, name, shape)?;
    for rows in dense.chunks(bytes_at_once.max(1)) {
        for (part, bytes) in parts.iter_mut().zip(encoder.rows(rows)?) {
            part.extend(bytes);
        }
    }
    for (part, bytes) in parts.iter_mut().zip(encoder.finish()?) {
        part.extend(bytes);
    }
    Ok(parts)
}

/// `len` bytes: a random start, again and again.
pub fn fill(u: &mut Unstructured<'_>, len: usize) -> Result<Vec<u8>> {
    let start: Vec<u8> = u.arbitrary()?;
    let start = if start.is_empty() { vec![0] } else { start };
    Ok(start.into_iter().cycle().take(len).collect())
}

/// Reads every tensor whole and by single rows: nothing may panic, and both must agree.
pub fn read_everything(reader: &dyn CheckpointReader) {
    let names: Vec<&str> = reader.tensors().iter().map(|info| info.name.as_str()).collect();
    reader.prefetch(&names);
    for info in reader.tensors() {
        let values = reader.read_f32(&info.name);
        let Ok(parts) = reader.components(&info.name) else {
            // Compressed, and damaged.
            assert!(values.is_err() || info.elements() == 0, "{info:?}");
            continue;
        };
        let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
        if let Ok(values) = &values {
            assert_eq!(values.len(), info.elements(), "{info:?}");
        }
        let decoded = check_decoding(&info.name, info.encoding, &info.shape, &parts);
        assert_eq!(values.is_ok(), decoded && info.encoding.value_dtype().is_float_weight());
        let rows = MatrixShape::of(&info.shape).rows;
        let last = rows.saturating_sub(1)..rows;
        let (mut read, mut expected) = (vec![], vec![]);
        let found = reader.read_rows_dense(&info.name, last.clone(), &mut read).is_ok();
        let decodes = info
            .encoding
            .decode_dense(&info.name, &info.shape, &parts, last, &mut expected)
            .is_ok();
        assert_eq!((found, read), (decodes, expected), "{info:?}");
    }
    reader.release(&names);
}

/// Decodes a tensor in every way, which must agree, and says whether it decodes.
pub fn check_decoding(name: &str, encoding: Encoding, shape: &[usize], parts: &[&[u8]]) -> bool {
    let MatrixShape { rows, cols } = MatrixShape::of(shape);
    let mut whole = vec![];
    let decoded = encoding.decode_dense(name, shape, parts, 0..rows, &mut whole).is_ok();
    assert!(decoded || whole.is_empty(), "a failed decode left bytes behind");
    let dtype = encoding.value_dtype();
    let mut values = vec![0.0; if decoded { whole.len() / dtype.size_bytes() } else { 0 }];
    let as_f32 = encoding.decode_all_f32(name, shape, parts, &mut values).is_ok();
    assert_eq!(as_f32, decoded && dtype.is_float_weight(), "{encoding} {shape:?}");
    if as_f32 && dtype == DType::F32 {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(bytes, whole, "decoding to f32 and to bytes differ");
    }
    let row_bytes = if decoded { cols * dtype.size_bytes() } else { 0 };
    for row in (0..if decoded { rows.min(9) } else { 0 }).chain(rows.checked_sub(1)) {
        let mut one = vec![];
        let result = encoding.decode_dense(name, shape, parts, row..row + 1, &mut one);
        if decoded {
            result.expect("a row of a tensor that decodes");
            assert_eq!(one, whole[row * row_bytes..][..row_bytes], "row {row}");
        }
    }
    decoded
}

/// One stored tensor of a safetensors file, not yet placed.
pub struct Stored {
    pub name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A safetensors file that may be right.
#[derive(Default)]
pub struct File {
    pub stored: Vec<Stored>,
    metadata: BTreeMap<String, String>,
    /// Bytes of the file that are overwritten.
    patches: Vec<(u16, u8)>,
}

impl File {
    /// A file with tensors of one letter; packed ones are declared.
    pub fn arbitrary(u: &mut Unstructured<'_>) -> Result<Self> {
        let mut file = Self::default();
        let mut declared = serde_json::Map::new();
        for _ in 0..u.int_in_range(0..=3)? {
            let mut name = char::from(u.int_in_range(b'a'..=b'f')?).to_string();
            let (encoding, shape) = (encoding(u)?, shape(u)?);
            if encoding.is_packed() && !encoding.is_declared() {
                name.push_str(".weight");
            }
            let Some(parts) = parts(u, &name, encoding, &shape)? else { continue };
            let components = encoding.components(&name, &shape).expect("they were just made");
            for (component, bytes) in components.iter().zip(parts) {
                file.stored.push(Stored {
                    name: encoding.component_name(&name, component),
                    dtype: component.dtype.name().to_owned(),
                    shape: component.shape.clone(),
                    bytes,
                });
            }
            if encoding.is_declared() {
                let mut declaration = serde_json::json!(encoding);
                declaration["shape"] = serde_json::json!(shape);
                declared.insert(name, declaration);
            }
        }
        if !declared.is_empty() {
            let text = serde_json::Value::Object(declared).to_string();
            file.metadata.insert("sparsepack.encodings".to_owned(), text);
        }
        if u.ratio(1, 4)? {
            file.metadata.insert(u.arbitrary()?, u.arbitrary()?);
        }
        if u.ratio(1, 4)? {
            file.stored.reverse();
        }
        if u.ratio(1, 2)? {
            file.patches = u.arbitrary()?;
        }
        Ok(file)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), serde_json::json!(self.metadata));
        let mut end = 0;
        for Stored { name, dtype, shape, bytes } in &self.stored {
            let offsets = [end, end + bytes.len()];
            end = offsets[1];
            header.insert(
                name.clone(),
                serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
            );
        }
        let header = serde_json::Value::Object(header).to_string();
        let data = self.stored.iter().flat_map(|stored| &stored.bytes);
        let mut bytes = framed(header.as_bytes());
        bytes.extend(data);
        for &(at, byte) in &self.patches {
            if let Some(place) = bytes.get_mut(usize::from(at)) {
                *place = byte;
            }
        }
        bytes
    }
}

/// A header with its length before it.
pub fn framed(header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header].concat()
}

/// A `String` most of the time one of `names`.
pub fn name(u: &mut Unstructured<'_>, names: &[&str]) -> Result<String> {
    if u.ratio(1, 8)? { String::arbitrary(u) } else { Ok((*u.choose(names)?).to_owned()) }
}
