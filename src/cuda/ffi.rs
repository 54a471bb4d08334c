//! cudarc's names for the driver's types.
pub use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUgraph, CUgraphExec, CUgraphNode, CUmodule,
    CUpointer_attribute, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus,
};
