//! Builds GGUF files byte by byte, so that each part can be made wrong.

/// The parts of a file. Counts follow from the parts unless they are set.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) pair_count: Option<u64>,
    pub(crate) pairs: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) alignment: usize,
    pub(crate) data: Vec<u8>,
}

impl Gguf {
    /// Version 3 with nothing in it.
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            tensor_count: None,
            pair_count: None,
            pairs: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            data: Vec::new(),
        }
    }

    /// With one metadata pair.
    pub(crate) fn pair(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.pairs.push(pair(key, value_type, value));
        self
    }

    /// With one tensor description, dimensions in file order.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, dims, ty, offset));
        self
    }

    /// With this many bytes of data.
    pub(crate) fn data(mut self, len: usize) -> Self {
        self.data = (0..len).map(|i| (i * 37 % 251) as u8).collect();
        self
    }

    /// The header, without padding.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        let tensor_count = self.tensor_count.unwrap_or(self.tensors.len() as u64);
        let pair_count = self.pair_count.unwrap_or(self.pairs.len() as u64);
        bytes.extend(tensor_count.to_le_bytes());
        bytes.extend(pair_count.to_le_bytes());
        bytes.extend(self.pairs.iter().flatten());
        bytes.extend(self.tensors.iter().flatten());
        bytes
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(&self.data);
        bytes
    }
}

/// A small file with every kind of value and three tensors; its last byte is data.
pub(crate) fn every_kind() -> Gguf {
    let mut file = Gguf::new()
        .pair("general.architecture", 8, &string("llama"))
        .pair("u8", 0, &[200])
        .pair("i8", 1, &[0xff])
        .pair("u16", 2, &500u16.to_le_bytes())
        .pair("i16", 3, &(-500i16).to_le_bytes())
        .pair("u32", 4, &70_000u32.to_le_bytes())
        .pair("i32", 5, &(-70_000i32).to_le_bytes())
        .pair("f32", 6, &0.5f32.to_le_bytes())
        .pair("bool", 7, &[1])
        .pair("u64", 10, &u64::MAX.to_le_bytes())
        .pair("i64", 11, &i64::MIN.to_le_bytes())
        .pair("f64", 12, &0.25f64.to_le_bytes())
        .pair("u8s", 9, &array(0, 2, &[1, 2]))
        .pair("i8s", 9, &array(1, 1, &[0xfe]))
        .pair("u16s", 9, &array(2, 1, &[1, 1]))
        .pair("i16s", 9, &array(3, 1, &[0xff, 0xff]))
        .pair("u32s", 9, &array(4, 1, &[1, 0, 0, 0]))
        .pair("i32s", 9, &array(5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]))
        .pair("f32s", 9, &array(6, 1, &1.5f32.to_le_bytes()))
        .pair("bools", 9, &array(7, 3, &[1, 0, 1]))
        .pair("strings", 9, &array(8, 2, &[string("a"), string("bé")].concat()))
        .pair("u64s", 9, &array(10, 1, &7u64.to_le_bytes()))
        .pair("i64s", 9, &array(11, 1, &(-7i64).to_le_bytes()))
        .pair("f64s", 9, &array(12, 1, &2.5f64.to_le_bytes()))
        .pair("empty", 9, &array(4, 0, &[]))
        .tensor("norm.weight", &[5], 0, 0)
        .tensor("a.weight", &[32, 3, 2], 8, 64)
        .tensor("b.weight", &[3, 2], 1, 32)
        .data(64 + 6 * 34);
    // Finite scales, so that decoded values can be compared.
    for block in file.data[64..].chunks_mut(34) {
        block[..2].copy_from_slice(&[0x00, 0x3c]);
    }
    file
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    raw_string(text.len() as u64, text.as_bytes())
}

/// A string whose length may not be that of its bytes.
pub(crate) fn raw_string(len: u64, bytes: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes(), bytes].concat()
}

pub(crate) fn array(element_type: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

pub(crate) fn pair(key: &str, value_type: u32, value: &[u8]) -> Vec<u8> {
    [&string(key)[..], &value_type.to_le_bytes(), value].concat()
}

pub(crate) fn tensor(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    bytes.extend(ty.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}
