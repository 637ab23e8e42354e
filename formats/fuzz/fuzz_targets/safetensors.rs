//! One safetensors file: any bytes, a header of any bytes, or tensors with a few bytes changed.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use sparsepack_formats::{MappedFile, safetensors::SafetensorsReader};
use sparsepack_formats_fuzz::{File, Scratch, framed, read_everything};

fn file(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(match u.int_in_range(0..=3)? {
        0 => u.bytes(u.len())?.to_vec(),
        1 => {
            let data = vec![0; u.arbitrary::<u8>()?.into()];
            [framed(u.bytes(u.len())?), data].concat()
        }
        _ => File::arbitrary(u)?.bytes(),
    })
}

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

fuzz_target!(|data: &[u8]| {
    let Ok(bytes) = file(&mut Unstructured::new(data)) else { return };
    let path = SCRATCH.with(|scratch| scratch.write("m.safetensors", &bytes));
    let file = MappedFile::open(&path).expect("a file that was just written");
    if let Ok(reader) = SafetensorsReader::open_file(file) {
        read_everything(&reader);
    }
});
