//! The C structures of DLPack: reading a foreign tensor, owning it, and making one from ours.

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape::{Dims, MAX_DIMS};
use crate::tensor::{OwnedTensor, Place, TensorView};
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion, DLTensor};
use dlpark::DlpackFlags;
use std::ptr::{self, NonNull};

/// The version whose structures we read and write. Minor versions only add enumerators.
pub(super) const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 3 };

/// What an input may be made of, for messages.
pub(crate) const DTYPES: &str = "float32, float16, bfloat16, float64, the integers from int8 to int64 and from uint8 to uint64, bool, \
                                 float8_e4m3fn, packed int4 and float4_e2m1fn";

/// A tensor that another library handed over. Dropping it calls the producer's deleter, once, on whatever thread.
pub struct Managed(Abi);

enum Abi {
    Legacy(NonNull<DLManagedTensor>),
    Versioned(NonNull<DLManagedTensorVersioned>),
}

// SAFETY: the protocol lets the consumer call the deleter from any thread; producers that need the GIL take it.
unsafe impl Send for Managed {}
// SAFETY: the structure is constant between hand-over and deleter; shared access only reads it.
unsafe impl Sync for Managed {}

impl Managed {
    /// # Safety
    /// `tensor` is a valid legacy structure that nobody else will release.
    pub(super) unsafe fn legacy(tensor: NonNull<DLManagedTensor>) -> Managed {
        Managed(Abi::Legacy(tensor))
    }

    /// # Safety
    /// `tensor` is a valid structure of DLPack 1.x that nobody else will release.
    pub(super) unsafe fn versioned(tensor: NonNull<DLManagedTensorVersioned>) -> Managed {
        Managed(Abi::Versioned(tensor))
    }

    pub fn view(&self, name: &str, device: i32) -> Result<TensorView> {
        // SAFETY: `self` owns a valid structure (contract of the constructors), so its arrays are readable.
        unsafe {
            match &self.0 {
                Abi::Legacy(t) => view_of(&t.as_ref().dl_tensor, DlpackFlags::empty(), name, device),
                Abi::Versioned(t) => view_of(&t.as_ref().dl_tensor, t.as_ref().flags, name, device),
            }
        }
    }

    /// Legacy tensors cannot say that they are read-only.
    pub fn read_only(&self) -> bool {
        match &self.0 {
            Abi::Legacy(_) => false,
            // SAFETY: as in `view`.
            Abi::Versioned(t) => unsafe { t.as_ref().flags.contains(DlpackFlags::READ_ONLY) },
        }
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        // SAFETY: we own the structure and release it exactly once; the deleter may be null.
        unsafe {
            match self.0 {
                Abi::Legacy(t) => {
                    if let Some(delete) = t.as_ref().deleter {
                        delete(t.as_ptr())
                    }
                }
                Abi::Versioned(t) => {
                    if let Some(delete) = t.as_ref().deleter {
                        delete(t.as_ptr())
                    }
                }
            }
        }
    }
}

/// Is this packed tensor like `last` in everything but its address? Then nothing else needs to be read or checked again.
///
/// # Safety
/// As for [`view_of`].
#[inline]
pub(super) unsafe fn is_like(t: &DLTensor, last: &TensorView) -> bool {
    let place = match last.place {
        Place::Device(d) => t.device.device_type == DLDeviceType::CUDA && t.device.device_id == d,
        Place::Host => t.device.device_type == DLDeviceType::CPU,
    };
    let n = last.dims.rank();
    let (code, bits) = last.dtype.dlpack();
    if !(place && last.contiguous && t.ndim as usize == n && t.dtype.code.0 == code && t.dtype.bits == bits && t.dtype.lanes == 1)
        || t.data.is_null()
        || t.byte_offset != 0
    {
        return false;
    }
    if n == 0 {
        return true;
    }
    if t.shape.is_null() || t.strides.is_null() {
        return false;
    }
    // SAFETY: the caller vouches for `ndim` readable numbers behind both.
    let (shape, strides) = unsafe { (std::slice::from_raw_parts(t.shape, n), std::slice::from_raw_parts(t.strides, n)) };
    let mut step = 1;
    for ((&d, &s), &known) in shape.iter().zip(strides).zip(last.dims.as_slice()).rev() {
        if d != known || (s != step && d != 1) {
            return false;
        }
        step *= d;
    }
    true
}

/// Reads a structure. `device` is where managed memory counts as: every GPU reaches it, and DLPack gives it no index.
///
/// # Safety
/// `shape`, and `strides` unless null, point to `ndim` readable numbers.
pub(super) unsafe fn view_of(t: &DLTensor, flags: DlpackFlags, name: &str, device: i32) -> Result<TensorView> {
    let place = match t.device.device_type {
        DLDeviceType::CUDA => Place::Device(t.device.device_id),
        DLDeviceType::CPU | DLDeviceType::CUDAHOST => Place::Host,
        DLDeviceType::CUDAMANAGED => Place::Device(device),
        other => return Err(refused_device(other, t.device.device_id, name)),
    };
    let dtype = match DType::from_dlpack(t.dtype.code.0, t.dtype.bits, t.dtype.lanes) {
        Some(d) if d.size().is_none() && flags.contains(DlpackFlags::IS_SUBBYTE_TYPE_PADDED) => {
            return Err(refused_dtype(name, &format!("{d} padded to one byte an element")))
        }
        Some(d) => d,
        None => return Err(refused_dtype(name, &dtype_name(t.dtype))),
    };
    let ndim = usize::try_from(t.ndim).map_err(|_| refused_rank(name, i64::from(t.ndim)))?;
    if ndim > MAX_DIMS {
        return Err(refused_rank(name, i64::from(t.ndim)));
    }
    let read = |p: *const i64| -> Dims {
        if ndim == 0 || p.is_null() {
            return Dims::default();
        }
        // SAFETY: the caller vouches for `ndim` readable numbers.
        Dims::new(unsafe { std::slice::from_raw_parts(p, ndim) }).unwrap_or_default()
    };
    let dims = read(t.shape);
    if dims.rank() != ndim {
        return Err(broken(name, "a shape that is missing"));
    }
    let strides = (!t.strides.is_null()).then(|| read(t.strides));
    let Some(address) = (t.data as u64).checked_add(t.byte_offset) else {
        return Err(broken(name, "an address that overflows"));
    };
    checked(address, t.data.is_null(), dtype, dims, strides, place, name)
}

/// The checks that every foreign tensor passes, whatever it came by.
pub(crate) fn checked(
    ptr: u64,
    null: bool,
    dtype: DType,
    dims: Dims,
    strides: Option<Dims>,
    place: Place,
    name: &str,
) -> Result<TensorView> {
    let Some(bytes) = dims.volume().and_then(|n| dtype.bytes(n)) else {
        return Err(broken(name, &format!("the shape {dims}")));
    };
    if null && bytes > 0 {
        return Err(Error::input(
            Kind::Device,
            name,
            format!("{dtype}{dims} without data behind it (a null pointer)"),
            "a tensor with memory of its own",
            "Fake, meta, zero and wrapper tensors hold no values: pass a real tensor.",
        ));
    }
    Ok(TensorView::new(ptr, dtype, dims, strides, place))
}

#[cold]
pub(crate) fn refused_dtype(name: &str, found: &str) -> Error {
    let next = if found.starts_with("complex") {
        "TensorRT has no complex numbers: pass real and imaginary part as real tensors."
    } else {
        "Convert it to the type that the engine expects first."
    };
    Error::input(Kind::DType, name, found, DTYPES, next)
}

#[cold]
pub(crate) fn refused_rank(name: &str, found: i64) -> Error {
    Error::input(
        Kind::Shape,
        name,
        format!("{found} dimensions"),
        format!("0 to {MAX_DIMS} dimensions"),
        "Reshape it to the rank that the engine expects.",
    )
}

#[cold]
fn broken(name: &str, found: &str) -> Error {
    Error::input(
        Kind::Shape,
        name,
        found,
        "a shape of non-negative sizes within the address space",
        "This is a fault of the library that made the tensor.",
    )
}

#[cold]
fn refused_device(kind: DLDeviceType, index: i32, name: &str) -> Error {
    let library = match kind {
        DLDeviceType::OPENCL => "OpenCL",
        DLDeviceType::VULKAN => "Vulkan",
        DLDeviceType::METAL => "Metal",
        DLDeviceType::ROCM | DLDeviceType::ROCMHOST => "ROCm",
        DLDeviceType::ONEAPI => "oneAPI",
        DLDeviceType::WEBGPU => "WebGPU",
        _ => "",
    };
    let found = match library {
        "" => format!("a tensor on a device of DLPack type {}, index {index}", kind.0),
        _ => format!("a tensor on {library} device {index}"),
    };
    Error::input(
        Kind::Device,
        name,
        found,
        "CUDA or host memory",
        "Copy it to the engine's GPU or to the host first.",
    )
}

/// The name of a type that jetrt does not take, as its library would write it where that is known.
fn dtype_name(t: DLDataType) -> String {
    let scalar = match t.code {
        DLDataTypeCode::INT => format!("int{}", t.bits),
        DLDataTypeCode::UINT => format!("uint{}", t.bits),
        DLDataTypeCode::FLOAT => format!("float{}", t.bits),
        DLDataTypeCode::BFLOAT => format!("bfloat{}", t.bits),
        DLDataTypeCode::COMPLEX => format!("complex{}", t.bits),
        DLDataTypeCode::BOOL => format!("bool of {} bits", t.bits),
        DLDataTypeCode::FLOAT8_E3M4 => "float8_e3m4".into(),
        DLDataTypeCode::FLOAT8_E4M3 => "float8_e4m3".into(),
        DLDataTypeCode::FLOAT8_E4M3B11FNUZ => "float8_e4m3b11fnuz".into(),
        DLDataTypeCode::FLOAT8_E4M3FNUZ => "float8_e4m3fnuz".into(),
        DLDataTypeCode::FLOAT8_E5M2 => "float8_e5m2".into(),
        DLDataTypeCode::FLOAT8_E5M2FNUZ => "float8_e5m2fnuz".into(),
        DLDataTypeCode::FLOAT4_E2M1FN => "float4_e2m1fn".into(),
        other => format!("DLPack type {} of {} bits", other.0, t.bits),
    };
    match t.lanes {
        1 => scalar,
        lanes => format!("{scalar} in vectors of {lanes}"),
    }
}

/// One of our tensors as a structure that another library may keep: structure, shape, strides and owner in one block.
#[repr(C)]
struct Export<M> {
    managed: M,
    dims: [i64; MAX_DIMS],
    strides: [i64; MAX_DIMS],
    /// Held for its `Drop` alone.
    _owner: std::sync::Arc<dyn Send + Sync>,
}

unsafe extern "C" fn release_versioned(t: *mut DLManagedTensorVersioned) {
    if !t.is_null() {
        // SAFETY: `manager_ctx` is the block that `versioned` leaked, and the consumer calls this once.
        release(unsafe { Box::from_raw((*t).manager_ctx.cast::<Export<DLManagedTensorVersioned>>()) })
    }
}

unsafe extern "C" fn release_legacy(t: *mut DLManagedTensor) {
    if !t.is_null() {
        // SAFETY: as in `release_versioned`, for `legacy`.
        release(unsafe { Box::from_raw((*t).manager_ctx.cast::<Export<DLManagedTensor>>()) })
    }
}

/// A panic must not unwind into the consumer's C code.
fn release<M>(block: Box<Export<M>>) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(block)));
}

/// `ptr` and `device` say how the tensor presents itself: the same mapped memory is CUDA for torch and CPU for numpy.
pub(super) fn versioned(t: OwnedTensor, ptr: u64, device: DLDevice, flags: DlpackFlags) -> NonNull<DLManagedTensorVersioned> {
    let (dl_tensor, dims, strides) = tensor(&t.view, ptr, device);
    let managed = DLManagedTensorVersioned {
        version: VERSION,
        manager_ctx: ptr::null_mut(),
        deleter: Some(release_versioned),
        flags,
        dl_tensor,
    };
    let block = NonNull::from(Box::leak(Box::new(Export {
        managed,
        dims,
        strides,
        _owner: t.owner,
    })));
    // SAFETY: the block was just leaked, so it is valid and ours alone until it is handed over.
    unsafe {
        let block = block.as_ptr();
        (*block).managed.manager_ctx = block.cast();
        (*block).managed.dl_tensor.shape = (&raw mut (*block).dims).cast();
        (*block).managed.dl_tensor.strides = (&raw mut (*block).strides).cast();
        NonNull::new_unchecked(&raw mut (*block).managed)
    }
}

/// As [`versioned`], for consumers from before DLPack 1.0, who cannot be told any flag.
pub(super) fn legacy(t: OwnedTensor, ptr: u64, device: DLDevice) -> NonNull<DLManagedTensor> {
    let (dl_tensor, dims, strides) = tensor(&t.view, ptr, device);
    let managed = DLManagedTensor {
        dl_tensor,
        manager_ctx: ptr::null_mut(),
        deleter: Some(release_legacy),
    };
    let block = NonNull::from(Box::leak(Box::new(Export {
        managed,
        dims,
        strides,
        _owner: t.owner,
    })));
    // SAFETY: as in `versioned`.
    unsafe {
        let block = block.as_ptr();
        (*block).managed.manager_ctx = block.cast();
        (*block).managed.dl_tensor.shape = (&raw mut (*block).dims).cast();
        (*block).managed.dl_tensor.strides = (&raw mut (*block).strides).cast();
        NonNull::new_unchecked(&raw mut (*block).managed)
    }
}

fn tensor(view: &TensorView, ptr: u64, device: DLDevice) -> (DLTensor, [i64; MAX_DIMS], [i64; MAX_DIMS]) {
    let full = |d: &Dims| {
        let mut out = [0; MAX_DIMS];
        out[..d.rank()].copy_from_slice(d.as_slice());
        out
    };
    let strides = if view.contiguous {
        view.dims.contiguous_strides()
    } else {
        view.strides
    };
    let (code, bits) = view.dtype.dlpack();
    let t = DLTensor {
        // The protocol asks for a null pointer where there are no elements.
        data: if view.elements() == 0 {
            ptr::null_mut()
        } else {
            ptr as usize as *mut _
        },
        device,
        ndim: view.dims.rank() as i32,
        dtype: DLDataType {
            code: DLDataTypeCode(code),
            bits,
            lanes: 1,
        },
        shape: ptr::null_mut(),
        strides: ptr::null_mut(),
        byte_offset: 0,
    };
    (t, full(&view.dims), full(&strides))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Arc;

    struct Count(Arc<AtomicUsize>);
    impl Drop for Count {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    const CPU: DLDevice = DLDevice {
        device_type: DLDeviceType::CPU,
        device_id: 0,
    };

    fn owned(dims: &[i64], strides: Option<&[i64]>) -> (OwnedTensor, Arc<AtomicUsize>) {
        let drops = Arc::new(AtomicUsize::new(0));
        let strides = strides.map(|s| Dims::new(s).unwrap());
        let view = TensorView::new(0x1000, DType::Bf16, Dims::new(dims).unwrap(), strides, Place::Host);
        (
            OwnedTensor {
                view,
                host_ptr: Some(0x1000),
                owner: Arc::new(Count(drops.clone())),
            },
            drops,
        )
    }

    #[test]
    fn what_goes_out_comes_back_and_is_released_once_on_any_thread() {
        for (dims, strides) in [
            (&[2, 3][..], None),
            (&[], None),
            (&[4, 2], Some(&[1, 4][..])),
            (&[3], Some(&[0][..])),
        ] {
            let (t, drops) = owned(dims, strides);
            let view = t.view;
            // SAFETY: the structures were just made and are released by `Managed` alone.
            let back = unsafe { Managed::versioned(versioned(t.clone(), 0x1000, CPU, DlpackFlags::READ_ONLY)) };
            assert_eq!(back.view("x", 0).unwrap(), view);
            assert!(back.read_only());
            // SAFETY: as above.
            let old = unsafe { Managed::legacy(legacy(t, 0x1000, CPU)) };
            assert_eq!(old.view("x", 0).unwrap(), view);
            assert!(!old.read_only());
            drop(back);
            assert_eq!(drops.load(Ordering::SeqCst), 0);
            std::thread::spawn(move || drop(old)).join().unwrap();
            assert_eq!(drops.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn empty_tensors_carry_no_address() {
        let (t, _drops) = owned(&[0, 3], None);
        let p = versioned(t, 0x1000, CPU, DlpackFlags::empty());
        // SAFETY: just made; released by `Managed`.
        unsafe {
            assert!(p.as_ref().dl_tensor.data.is_null());
            let back = Managed::versioned(p);
            assert_eq!(back.view("x", 0).unwrap().elements(), 0);
        }
    }

    fn foreign(shape: &mut [i64]) -> DLTensor {
        DLTensor {
            data: 0x1000 as *mut _,
            device: CPU,
            ndim: shape.len() as i32,
            dtype: DLDataType {
                code: DLDataTypeCode::FLOAT,
                bits: 32,
                lanes: 1,
            },
            shape: shape.as_mut_ptr(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        }
    }

    fn read(t: &DLTensor, flags: DlpackFlags) -> Result<TensorView> {
        // SAFETY: the tests below give as many sizes as dimensions.
        unsafe { view_of(t, flags, "x", 5) }
    }

    fn refusal(t: &DLTensor) -> (Kind, String) {
        let e = read(t, DlpackFlags::empty()).unwrap_err();
        (e.kind(), e.message().to_owned())
    }

    #[test]
    fn devices() {
        let mut shape = [2];
        let at = |kind, index| DLTensor {
            device: DLDevice {
                device_type: kind,
                device_id: index,
            },
            ..foreign(&mut [2])
        };
        let place = |kind, index, shape: &mut [i64]| {
            let t = DLTensor {
                shape: shape.as_mut_ptr(),
                ..at(kind, index)
            };
            read(&t, DlpackFlags::empty()).map(|v| v.place)
        };
        assert_eq!(place(DLDeviceType::CUDA, 3, &mut shape).unwrap(), Place::Device(3));
        assert_eq!(place(DLDeviceType::CUDAHOST, 0, &mut shape).unwrap(), Place::Host);
        assert_eq!(place(DLDeviceType::CUDAMANAGED, 0, &mut shape).unwrap(), Place::Device(5));
        let e = place(DLDeviceType::ROCM, 1, &mut shape).unwrap_err();
        assert_eq!(e.kind(), Kind::Device);
        assert!(e.message().contains("ROCm device 1"), "{e}");
    }

    #[test]
    fn what_is_refused() {
        let mut shape = [2, 3];
        let t = foreign(&mut shape);
        let of = |code, bits, lanes| DLTensor {
            dtype: DLDataType { code, bits, lanes },
            ..t
        };
        let (kind, text) = refusal(&of(DLDataTypeCode::COMPLEX, 64, 1));
        assert_eq!(kind, Kind::DType);
        assert!(text.contains("complex64") && text.contains("imaginary"), "{text}");
        assert!(refusal(&of(DLDataTypeCode::FLOAT8_E5M2, 8, 1)).1.contains("float8_e5m2"));
        assert!(refusal(&of(DLDataTypeCode::FLOAT, 32, 4)).1.contains("float32 in vectors of 4"));
        assert_eq!(
            refusal(&DLTensor {
                data: ptr::null_mut(),
                ..t
            })
            .0,
            Kind::Device
        );
        assert_eq!(refusal(&DLTensor { ndim: -1, ..t }).0, Kind::Shape);
        assert_eq!(
            refusal(&DLTensor {
                shape: ptr::null_mut(),
                ..t
            })
            .0,
            Kind::Shape
        );
        assert_eq!(
            refusal(&DLTensor {
                byte_offset: u64::MAX,
                ..t
            })
            .0,
            Kind::Shape
        );
        assert_eq!(refusal(&foreign(&mut [1; 9])).0, Kind::Shape);
        assert_eq!(refusal(&foreign(&mut [-2, 3])).0, Kind::Shape);
        assert_eq!(refusal(&foreign(&mut [i64::MAX, 3])).0, Kind::Shape);
    }

    #[test]
    fn padded_four_bit_elements_are_not_read_as_packed() {
        let mut shape = [4];
        let t = DLTensor {
            dtype: DLDataType {
                code: DLDataTypeCode::INT,
                bits: 4,
                lanes: 1,
            },
            ..foreign(&mut shape)
        };
        assert_eq!(read(&t, DlpackFlags::empty()).unwrap().bytes(), Some(2));
        assert_eq!(read(&t, DlpackFlags::IS_SUBBYTE_TYPE_PADDED).unwrap_err().kind(), Kind::DType);
    }

    #[test]
    fn byte_offset_moves_the_address() {
        let mut shape = [2];
        let t = DLTensor {
            byte_offset: 16,
            ..foreign(&mut shape)
        };
        assert_eq!(read(&t, DlpackFlags::empty()).unwrap().ptr, 0x1010);
    }

    #[test]
    fn a_tensor_without_a_deleter_is_fine() {
        let mut shape = [2];
        let mut t = DLManagedTensor {
            dl_tensor: foreign(&mut shape),
            manager_ctx: ptr::null_mut(),
            deleter: None,
        };
        // SAFETY: the structure outlives the handle, and nothing needs releasing.
        drop(unsafe { Managed::legacy(NonNull::from(&mut t)) });
    }
}
