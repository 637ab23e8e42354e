//! Kernels: their text, loaded when first launched, and launches that are checked against the parameters
//! in the text.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::{
    driver::{
        CudaFunction, CudaModule, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice,
        result, sys,
    },
    nvrtc,
};
use half::bf16;

use super::{Gpu, Memory, compile::Compiler};
use crate::backend::{BackendError, Result};

/// Dynamic shared memory that a launch may have without asking.
const PLAIN_SHARED: usize = 48 << 10;

macro_rules! kernel_files {
    ($($(#[$doc:meta])* $variant:ident = $file:literal),* $(,)?) => {
        /// A file of kernels.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(in super::super) enum KernelFile {
            $($(#[$doc])* $variant,)*
        }

        impl KernelFile {
            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$variant => $file,)* }
            }

            pub(super) fn text(self) -> &'static str {
                match self { $(Self::$variant => include_str!(concat!("../kernels/", $file)),)* }
            }
        }
    };
}

kernel_files! {
    /// Norms of rows.
    Norm = "norm.cu",
    /// Rotary embeddings.
    Rope = "rope.cu",
    /// Causal attention in f32.
    AttentionF32 = "attention_f32.cu",
    /// Causal attention on tensor cores.
    AttentionBf16 = "attention_bf16.cu",
    /// Activations of an MLP.
    Activation = "activation.cu",
    /// Conversions, biases, factors of rows.
    Elementwise = "elementwise.cu",
    /// Likelihoods.
    Nll = "nll.cu",
    /// Sums over tokens.
    Stats = "stats.cu",
    /// Exact selection of the lowest scores.
    Select = "select.cu",
    /// Scales of groups of weights.
    Scales = "scales.cu",
    /// Column blocks of Algorithm 1, and rounding.
    Sweep = "sweep.cu",
    /// Around the factorisation.
    Solve = "solve.cu",
    /// Stored types, and the 2:4 packing.
    Pack = "pack.cu",
}

/// One argument of a launch. The address of memory is good for as long as the memory is borrowed.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Arg<'a> {
    kind: Kind,
    bits: u64,
    borrowed: PhantomData<&'a ()>,
}

/// The type of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scalar(&'static str),
    Pointer { to: &'static str, constant: bool },
}

impl<'a> Arg<'a> {
    fn new(kind: Kind, bits: u64) -> Self {
        Self { kind, bits, borrowed: PhantomData }
    }

    /// Memory that is only read, or none.
    pub(in super::super) fn optional<T: Named>(memory: Option<&'a Memory<T>>) -> Self {
        match memory {
            Some(memory) => memory.into(),
            None => Self::new(Kind::Pointer { to: T::NAME, constant: true }, 0),
        }
    }

    /// Memory that is written, or none.
    pub(in super::super) fn optional_mut<T: Named>(memory: Option<&'a mut Memory<T>>) -> Self {
        match memory {
            Some(memory) => memory.into(),
            None => Self::new(Kind::Pointer { to: T::NAME, constant: false }, 0),
        }
    }
}

/// What a type is called in kernels.
pub(in super::super) trait Named {
    const NAME: &'static str;
}

macro_rules! named {
    ($($ty:ty = $name:literal),*) => {
        /// The types that parameters have or point to.
        const TYPES: [&str; [$($name),*].len()] = [$($name),*];

        $(impl Named for $ty {
            const NAME: &'static str = $name;
        })*
    };
}

named!(
    f32 = "float",
    f64 = "double",
    bf16 = "bf16",
    u8 = "u8",
    i8 = "i8",
    u16 = "u16",
    u32 = "u32",
    u64 = "u64"
);

macro_rules! scalars {
    ($($ty:ty: $bits:expr),*) => {
        $(impl From<$ty> for Arg<'_> {
            fn from(value: $ty) -> Self {
                let bits: fn($ty) -> u64 = $bits;
                Self::new(Kind::Scalar(<$ty>::NAME), bits(value))
            }
        })*
    };
}

scalars!(f32: |x| u64::from(x.to_bits()), f64: f64::to_bits, u32: u64::from, u64: |x| x);

impl<'a, T: Named> From<&'a Memory<T>> for Arg<'a> {
    fn from(memory: &'a Memory<T>) -> Self {
        let (address, _) = memory.device_ptr(memory.stream());
        Self::new(Kind::Pointer { to: T::NAME, constant: true }, address)
    }
}

impl<'a, T: Named> From<&'a mut Memory<T>> for Arg<'a> {
    fn from(memory: &'a mut Memory<T>) -> Self {
        let stream = memory.stream().clone();
        let (address, _) = memory.device_ptr_mut(&stream);
        Self::new(Kind::Pointer { to: T::NAME, constant: false }, address)
    }
}

impl<'a, T: Named> From<&'a CudaView<'_, T>> for Arg<'a> {
    fn from(view: &'a CudaView<'_, T>) -> Self {
        let (address, _) = view.device_ptr(view.stream());
        Self::new(Kind::Pointer { to: T::NAME, constant: true }, address)
    }
}

impl<'a, T: Named> From<&'a mut CudaViewMut<'_, T>> for Arg<'a> {
    fn from(view: &'a mut CudaViewMut<'_, T>) -> Self {
        let stream = view.stream().clone();
        let (address, _) = view.device_ptr_mut(&stream);
        Self::new(Kind::Pointer { to: T::NAME, constant: false }, address)
    }
}

/// How many threads a launch has.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Geometry {
    /// Blocks in x, y and z.
    pub(in super::super) blocks: [usize; 3],
    /// Threads of a block in x and y.
    pub(in super::super) threads: [u32; 2],
    /// Bytes of dynamic shared memory of a block.
    pub(in super::super) shared: usize,
}

/// The files that were loaded so far, and their kernels that were launched.
#[derive(Debug)]
pub(super) struct Kernels {
    compiler: Compiler,
    loaded: Mutex<HashMap<(KernelFile, Option<u32>), Module>>,
}

#[derive(Debug)]
struct Module {
    module: Arc<CudaModule>,
    kernels: HashMap<&'static str, Arc<Kernel>>,
}

#[derive(Debug)]
struct Kernel {
    function: CudaFunction,
    parameters: Vec<Kind>,
}

impl Kernels {
    pub(super) fn new(arch: (i32, i32)) -> Self {
        Self { compiler: Compiler::new(arch), loaded: Mutex::default() }
    }
}

impl Gpu {
    /// Launches kernel `name` of `file`. Does nothing where there is no block to run.
    pub(in super::super) fn launch(
        &self,
        file: KernelFile,
        name: &'static str,
        Geometry { blocks, threads, shared }: Geometry,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if blocks.contains(&0) {
            return Ok(());
        }
        let kernel = self.kernel(file, name)?;
        check(name, &kernel.parameters, args)?;
        let limits = [i32::MAX as usize, 65_535, 65_535];
        if blocks.iter().zip(limits).any(|(blocks, limit)| *blocks > limit) {
            let detail = format!("{blocks:?} blocks of {name}");
            return Err(BackendError::Shape { operation: "launch", detail });
        }
        if shared > PLAIN_SHARED {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.function.set_attribute(attribute, shared as i32).map_err(self.failed(name))?;
        }
        let [x, y, z] = blocks.map(|blocks| blocks as u32);
        let mut values: Vec<u64> = args.iter().map(|arg| arg.bits).collect();
        let mut addresses: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        self.context.bind_to_thread().map_err(self.failed(name))?;
        // SAFETY: the function lives as long as its module, which `kernel` holds. There are as many
        // arguments as the kernel's text has parameters, of the same types, and each address is of 8
        // bytes of which the kernel reads as many as its parameter has (little-endian). Memory they
        // point to is borrowed during the call and used on this stream only, so it is not freed before
        // the kernel has run. That kernels stay inside it is what conformance tests check, on a device
        // whose memory has guard pages.
        let launched = unsafe {
            result::launch_kernel(
                kernel.function.cu_function(),
                (x, y, z),
                (threads[0], threads[1], 1),
                shared as u32,
                self.stream.cu_stream(),
                &mut addresses,
            )
        };
        launched.map_err(self.failed(name))
    }

    /// Finds a kernel, loading its file first where that has not been done.
    fn kernel(&self, file: KernelFile, name: &'static str) -> Result<Arc<Kernel>> {
        let mut loaded = self.kernels.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let instance = instance(name);
        let module = match loaded.entry((file, instance)) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(new) => {
                let image = self.kernels.compiler.code(file, instance)?;
                let module = self.context.load_module(nvrtc::Ptx::from_binary(image));
                let module = module.map_err(self.failed(file.name()))?;
                new.insert(Module { module, kernels: HashMap::new() })
            }
        };
        if let Some(kernel) = module.kernels.get(name) {
            return Ok(kernel.clone());
        }
        let parameters = parameters(file.text(), name).ok_or_else(|| BackendError::Shape {
            operation: "launch",
            detail: format!("{} has no kernel {name} of known parameters", file.name()),
        })?;
        let function = module.module.load_function(name).map_err(self.failed(name))?;
        let kernel = Arc::new(Kernel { function, parameters });
        module.kernels.insert(name, kernel.clone());
        Ok(kernel)
    }
}

/// Refuses arguments that are not those of the kernel's text: a defect of the caller.
fn check(name: &'static str, parameters: &[Kind], args: &[Arg<'_>]) -> Result<()> {
    let fits = |(parameter, arg): (&Kind, &Arg<'_>)| match (parameter, arg.kind) {
        // What may be written may be read.
        (Kind::Pointer { to, constant: true }, Kind::Pointer { to: given, .. }) => *to == given,
        (parameter, given) => *parameter == given,
    };
    if parameters.len() == args.len() && parameters.iter().zip(args).all(fits) {
        return Ok(());
    }
    let given: Vec<Kind> = args.iter().map(|arg| arg.kind).collect();
    let detail = format!("{name} has {parameters:?}, given {given:?}");
    Err(BackendError::Shape { operation: "launch", detail })
}

/// The parameters of kernel `name` in the text of its file; nothing where there is none, or where one
/// has a type that is not known here.
fn parameters(text: &str, name: &str) -> Option<Vec<Kind>> {
    let declared = text.match_indices("KERNEL").find_map(|(at, keyword)| {
        let rest = text[at + keyword.len()..].trim_start();
        // Launch bounds may stand between.
        let rest = match rest.strip_prefix("__launch_bounds__") {
            Some(bounds) => bounds.split_once(')')?.1.trim_start(),
            None => rest,
        };
        rest.strip_prefix(name)?.trim_start().strip_prefix('(')
    })?;
    let declared = declared.split_once(')')?.0;
    let code: Vec<&str> =
        declared.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let code = code.join(" ");
    code.split(',').map(kind).collect()
}

/// The type of a parameter as it is declared.
fn kind(parameter: &str) -> Option<Kind> {
    let spaced = parameter.replace("__restrict__", " ").replace('*', " * ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let known = |word: &str| TYPES.into_iter().find(|name| *name == word);
    match words.as_slice() {
        ["const", to, "*", _] => Some(Kind::Pointer { to: known(to)?, constant: true }),
        [to, "*", _] => Some(Kind::Pointer { to: known(to)?, constant: false }),
        ["const", scalar, _] | [scalar, _] => Some(Kind::Scalar(known(scalar)?)),
        _ => None,
    }
}

/// The number at the end of the name of a kernel that a file has for several sizes. Only the instance
/// that is launched is compiled.
fn instance(name: &str) -> Option<u32> {
    name.rsplit_once('_')?.1.parse().ok()
}
