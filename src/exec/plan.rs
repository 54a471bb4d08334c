//! What a call means, decided without a GPU: is each input allowed, which profile fits, what must be copied or cast.

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::{first_fitting, Dims, Range};
use crate::tensor::{Place, TensorView};
use crate::trt::IoTensor;

/// "The pointer must have at least 256-byte alignment": TensorRT's documentation of `setTensorAddress`.
pub const ALIGNMENT: u64 = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStrided {
    Error,
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDtype {
    Error,
    Cast,
}

/// What happens to an array in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostMode {
    /// Staged on a discrete GPU; on an integrated one used in place when page-locked, else copied to page-locked memory.
    Auto,
    /// Used in place by the GPU; memory that is not page-locked is an error.
    Mapped,
    /// Copied to device memory through page-locked memory.
    Staged,
    /// Refused.
    Error,
}

#[derive(Debug, Clone, Copy)]
pub struct Policy {
    pub strided: OnStrided,
    pub dtype: OnDtype,
    pub host: HostMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileChoice {
    /// The first one that fits.
    Auto,
    Fixed(usize),
}

/// What must be done before an input can be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: its own address is bound.
    Bind,
    /// One kernel packs it, casts it, or both, into a staging buffer.
    Pack,
    /// It is in host memory; packed first and cast afterwards, where needed.
    Host,
    /// A shape tensor: its values are read on the host.
    HostValues,
}

/// The steady state's whole check of one input, besides its shape.
#[inline]
pub fn is_ready(io: &IoTensor, v: &TensorView, device: i32) -> bool {
    v.contiguous
        && v.dtype == io.dtype
        && v.place == Place::Device(device)
        && v.ptr.is_multiple_of(ALIGNMENT)
        && v.ptr != 0
        && !io.host
        && io.linear
}

/// Everything about one input except its shape; the error says what to do.
pub fn need(io: &IoTensor, v: &TensorView, device: i32, policy: &Policy) -> Result<Need> {
    if !io.linear {
        return Err(Error::input(
            Kind::Layout,
            &io.name,
            "row-major data",
            format!("the engine's format {}", io.format),
            "jetrt binds row-major tensors only: build the engine with linear I/O (jetrt build --io-formats NAME:any:linear).",
        ));
    }
    if v.dtype != io.dtype {
        if policy.dtype == OnDtype::Error || io.host {
            let next = if io.dtype == DType::I64 && v.dtype == DType::I32 || v.dtype == DType::F64 {
                "Convert it once where it is made, or pass on_dtype=\"cast\" to Engine to convert it at each call (counted in stats)."
            } else {
                "Convert it, or pass on_dtype=\"cast\" to Engine to convert it at each call (counted in stats)."
            };
            return Err(Error::input(Kind::DType, &io.name, v.dtype.name(), io.dtype.name(), next));
        }
        if !v.dtype.casts_to(io.dtype) {
            return Err(Error::input(
                Kind::DType,
                &io.name,
                v.dtype.name(),
                io.dtype.name(),
                "There is no conversion between the two: make it with the library that owns the array.",
            ));
        }
    }
    if io.host {
        if v.place != Place::Host {
            return Err(Error::input(
                Kind::Device,
                &io.name,
                v.place.to_string(),
                "cpu: this is a shape tensor, whose values TensorRT reads on the host",
                "Pass a numpy array or a CPU tensor.",
            ));
        }
        return Ok(Need::HostValues);
    }
    if let Place::Device(d) = v.place {
        if d != device {
            return Err(Error::input(
                Kind::Device,
                &io.name,
                format!("cuda:{d}"),
                format!("cuda:{device}"),
                "Move the tensor, or load the engine with device= of the tensor.",
            ));
        }
    }
    if v.ptr == 0 && v.elements() > 0 {
        return Err(Error::input(
            Kind::Layout,
            &io.name,
            "a tensor without memory (null address)",
            "a tensor with data",
            "Fake and meta tensors have no data: pass a real one.",
        ));
    }
    if v.place == Place::Host {
        if policy.host == HostMode::Error {
            return Err(Error::input(
                Kind::Device,
                &io.name,
                "cpu",
                format!("cuda:{device} (host=\"error\")"),
                "Move the tensor to the GPU, or load the engine with host=\"auto\".",
            ));
        }
        if !v.contiguous && policy.strided == OnStrided::Error {
            return Err(strided(io, v));
        }
        return Ok(Need::Host);
    }
    let aligned = v.ptr.is_multiple_of(ALIGNMENT) || v.elements() == 0;
    if v.contiguous && aligned && v.dtype == io.dtype {
        return Ok(Need::Bind);
    }
    if policy.strided == OnStrided::Error {
        if !v.contiguous {
            return Err(strided(io, v));
        }
        if !aligned && v.dtype == io.dtype {
            return Err(Error::input(
                Kind::Layout,
                &io.name,
                format!("address {:#x}", v.ptr),
                format!("a multiple of {ALIGNMENT} bytes (TensorRT's rule for tensor addresses)"),
                "This is a slice that begins inside a buffer: pass a copy of it (.clone()), or on_strided=\"copy\" to Engine.",
            ));
        }
    }
    Ok(Need::Pack)
}

fn strided(io: &IoTensor, v: &TensorView) -> Error {
    Error::input(
        Kind::Layout,
        &io.name,
        format!("shape {} with strides {} (in elements)", v.dims, v.strides),
        format!("row-major strides {}", v.dims.contiguous_strides()),
        "Pass .contiguous(), or on_strided=\"copy\" to Engine to pack it at each call (counted in stats).",
    )
}

/// The profile for these shapes (`dims[i]` belongs to `inputs[i]`), or the error that names the input and what each profile allows.
pub fn choose_profile(inputs: &[&IoTensor], dims: &[Dims], choice: ProfileChoice, profiles: usize) -> Result<usize> {
    for (io, d) in inputs.iter().zip(dims) {
        if d.rank() != io.shape.rank() {
            return Err(Error::input(
                Kind::Shape,
                &io.name,
                format!("{d}, {} dimension(s)", d.rank()),
                format!("{}, {} dimension(s)", allowed(io), io.shape.rank()),
                "Add or remove dimensions (unsqueeze, squeeze, reshape).",
            ));
        }
    }
    let of = |p: usize| -> Vec<Range> { inputs.iter().map(|io| io.profiles.get(p).copied().unwrap_or(fixed(io))).collect() };
    let ranges: Vec<Vec<Range>> = match choice {
        ProfileChoice::Auto => (0..profiles.max(1)).map(of).collect(),
        ProfileChoice::Fixed(p) => vec![of(p)],
    };
    if let Some(p) = first_fitting(&ranges, dims) {
        return Ok(match choice {
            ProfileChoice::Auto => p,
            ProfileChoice::Fixed(fixed) => fixed,
        });
    }
    // Name the input that keeps the closest profile from fitting.
    let misfits = |r: &Vec<Range>| r.iter().zip(dims).filter(|(r, d)| !r.contains(d)).count();
    let closest = ranges.iter().enumerate().min_by_key(|(_, r)| misfits(r)).map_or(0, |(i, _)| i);
    let bad = ranges[closest].iter().zip(dims).position(|(r, d)| !r.contains(d)).unwrap_or(0);
    let io = inputs[bad];
    let next = if ranges.len() > 1 {
        format!(
            "No profile fits all inputs together (closest: profile {closest}). Change the shape or build the engine with a profile for it."
        )
    } else {
        "Change the shape, or build the engine with a profile that includes it.".into()
    };
    let allowed = match choice {
        ProfileChoice::Auto => allowed(io),
        ProfileChoice::Fixed(p) => format!("{} in profile {p}", ranges[0][bad]),
    };
    Err(Error::input(Kind::Shape, &io.name, dims[bad].to_string(), allowed, &next))
}

fn fixed(io: &IoTensor) -> Range {
    Range {
        min: io.shape,
        opt: io.shape,
        max: io.shape,
    }
}

/// `[1..8, 64]`, or one range per profile.
fn allowed(io: &IoTensor) -> String {
    match io.profiles.as_slice() {
        [] => io.shape.to_string(),
        [one] => one.to_string(),
        many => many
            .iter()
            .enumerate()
            .map(|(i, r)| format!("{r} in profile {i}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// One output of a call: `bytes` is what its buffer must hold. A data-dependent shape is known only after the enqueue.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputPlan {
    pub dims: Dims,
    pub bytes: u64,
    pub data_dependent: bool,
}

impl OutputPlan {
    pub fn new(io: &IoTensor, dims: Dims) -> Result<OutputPlan> {
        if !io.linear {
            let e = Error::new(
                Kind::Layout,
                format!(
                    "output '{}': found the engine's format {}; allowed: row-major. Build the engine with linear I/O (jetrt build --io-formats NAME:any:linear).",
                    io.name, io.format
                ),
            );
            return Err(e
                .with("tensor", io.name.clone())
                .with("found", io.format.clone())
                .with("allowed", "row-major"));
        }
        if !dims.is_static() {
            return Ok(OutputPlan {
                dims,
                bytes: 0,
                data_dependent: true,
            });
        }
        let bytes = dims.volume().and_then(|n| io.dtype.bytes(n)).ok_or_else(|| {
            Error::new(
                Kind::Shape,
                format!("output '{}': shape {dims} of {} overflows 64 bits", io.name, io.dtype),
            )
            .with("tensor", io.name.clone())
        })?;
        Ok(OutputPlan {
            dims,
            bytes,
            data_dependent: false,
        })
    }
}

/// Copies a strided host array row-major into `dst`: inner runs at once, the rest by walking. Returns (offset in elements,
/// length in elements) runs in order, so that the caller does the copying.
pub fn runs(dims: &Dims, strides: &Dims) -> Runs {
    let (d, s) = (dims.as_slice(), strides.as_slice());
    let mut inner = 1i64;
    let mut outer = d.len();
    while outer > 0 && (d[outer - 1] == 1 || s[outer - 1] == inner) {
        inner *= d[outer - 1];
        outer -= 1;
    }
    let empty = d.contains(&0);
    Runs {
        dims: d[..outer].to_vec(),
        strides: s[..outer].to_vec(),
        index: vec![0; outer],
        inner,
        done: empty,
    }
}

pub struct Runs {
    dims: Vec<i64>,
    strides: Vec<i64>,
    index: Vec<i64>,
    inner: i64,
    done: bool,
}

impl Iterator for Runs {
    type Item = (i64, i64);

    fn next(&mut self) -> Option<(i64, i64)> {
        if self.done {
            return None;
        }
        let offset = self.index.iter().zip(&self.strides).map(|(i, s)| i * s).sum();
        self.done = true;
        for k in (0..self.dims.len()).rev() {
            self.index[k] += 1;
            if self.index[k] < self.dims[k] {
                self.done = false;
                break;
            }
            self.index[k] = 0;
        }
        Some((offset, self.inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn d(x: &[i64]) -> Dims {
        Dims::new(x).unwrap()
    }

    fn io(name: &str, dtype: DType, shape: &[i64], profiles: &[(&[i64], &[i64])]) -> IoTensor {
        IoTensor::for_tests(
            name,
            dtype,
            d(shape),
            profiles
                .iter()
                .map(|(lo, hi)| Range {
                    min: d(lo),
                    opt: d(lo),
                    max: d(hi),
                })
                .collect(),
        )
    }

    fn view(dtype: DType, dims: &[i64], strides: Option<&[i64]>, place: Place) -> TensorView {
        TensorView::new(0x1000, dtype, d(dims), strides.map(d), place)
    }

    const STRICT: Policy = Policy {
        strided: OnStrided::Error,
        dtype: OnDtype::Error,
        host: HostMode::Auto,
    };
    const LENIENT: Policy = Policy {
        strided: OnStrided::Copy,
        dtype: OnDtype::Cast,
        host: HostMode::Auto,
    };

    #[test]
    fn needs() {
        let x = io("x", DType::F32, &[-1, 4], &[(&[1, 4], &[8, 4])]);
        let gpu = Place::Device(0);
        let plain = view(DType::F32, &[2, 4], None, gpu);
        assert!(is_ready(&x, &plain, 0));
        assert_eq!(need(&x, &plain, 0, &STRICT).unwrap(), Need::Bind);
        let strided = view(DType::F32, &[2, 4], Some(&[1, 2]), gpu);
        assert!(!is_ready(&x, &strided, 0));
        assert_eq!(need(&x, &strided, 0, &STRICT).unwrap_err().kind(), Kind::Layout);
        assert_eq!(need(&x, &strided, 0, &LENIENT).unwrap(), Need::Pack);
        let half = view(DType::F16, &[2, 4], None, gpu);
        assert_eq!(need(&x, &half, 0, &STRICT).unwrap_err().kind(), Kind::DType);
        assert_eq!(need(&x, &half, 0, &LENIENT).unwrap(), Need::Pack);
        // A cast of a packed tensor is not a strided copy: on_strided does not matter.
        assert_eq!(
            need(
                &x,
                &half,
                0,
                &Policy {
                    strided: OnStrided::Error,
                    ..LENIENT
                }
            )
            .unwrap(),
            Need::Pack
        );
        assert_eq!(
            need(&x, &view(DType::Fp8, &[2, 4], None, gpu), 0, &LENIENT).unwrap_err().kind(),
            Kind::DType
        );
        assert_eq!(need(&x, &plain, 1, &LENIENT).unwrap_err().kind(), Kind::Device);
        assert_eq!(
            need(&x, &view(DType::F32, &[2, 4], None, Place::Host), 0, &STRICT).unwrap(),
            Need::Host
        );
        assert_eq!(
            need(
                &x,
                &view(DType::F32, &[2, 4], None, Place::Host),
                0,
                &Policy {
                    host: HostMode::Error,
                    ..STRICT
                }
            )
            .unwrap_err()
            .kind(),
            Kind::Device
        );
        let misaligned = TensorView { ptr: 0x1010, ..plain };
        assert_eq!(need(&x, &misaligned, 0, &STRICT).unwrap_err().kind(), Kind::Layout);
        assert_eq!(need(&x, &misaligned, 0, &LENIENT).unwrap(), Need::Pack);
        let null = TensorView { ptr: 0, ..plain };
        assert_eq!(need(&x, &null, 0, &LENIENT).unwrap_err().kind(), Kind::Layout);
        let empty = TensorView {
            ptr: 0,
            dims: d(&[0, 4]),
            ..plain
        };
        assert_eq!(need(&x, &empty, 0, &STRICT).unwrap(), Need::Bind);
    }

    #[test]
    fn profiles_are_chosen_and_refusals_name_input_and_ranges() {
        let x = io("x", DType::F32, &[-1, 4], &[(&[1, 4], &[8, 4]), (&[9, 4], &[64, 4])]);
        let y = io("y", DType::F32, &[-1], &[(&[1], &[2]), (&[1], &[2])]);
        let choose = |a: &[i64], b: &[i64], c| choose_profile(&[&x, &y], &[d(a), d(b)], c, 2);
        assert_eq!(choose(&[8, 4], &[1], ProfileChoice::Auto).unwrap(), 0);
        assert_eq!(choose(&[9, 4], &[1], ProfileChoice::Auto).unwrap(), 1);
        let e = choose(&[65, 4], &[1], ProfileChoice::Auto).unwrap_err();
        assert_eq!(e.kind(), Kind::Shape);
        assert!(
            e.message()
                .contains("input 'x': found [65, 4]; allowed: [1..8, 4] in profile 0, [9..64, 4] in profile 1"),
            "{e}"
        );
        assert!(choose(&[9, 4], &[3], ProfileChoice::Auto)
            .unwrap_err()
            .message()
            .contains("input 'y'"));
        assert!(choose(&[9, 4], &[1], ProfileChoice::Fixed(0))
            .unwrap_err()
            .message()
            .contains("[1..8, 4] in profile 0"));
        assert!(choose(&[9], &[1], ProfileChoice::Auto)
            .unwrap_err()
            .message()
            .contains("1 dimension(s)"));
    }

    proptest! {
        #[test]
        fn runs_walk_every_element_in_order(dims in prop::collection::vec(0i64..4, 0..5), seed in prop::collection::vec(-3i64..12, 5), packed in any::<bool>()) {
            let dd = d(&dims);
            let strides = if packed { dd.contiguous_strides() } else { d(&seed[..dims.len()]) };
            let walked: Vec<i64> = runs(&dd, &strides).flat_map(|(o, n)| o..o + n).collect();
            let n: i64 = dims.iter().product();
            let expected: Vec<i64> = (0..n).map(|k| {
                let (mut rest, mut at) = (k, 0);
                for (size, s) in dims.iter().zip(strides.as_slice()).rev() { at += rest % size * s; rest /= size; }
                at
            }).collect();
            prop_assert_eq!(walked, expected);
        }
    }
}
