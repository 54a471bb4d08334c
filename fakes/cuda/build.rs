fn main() {
    // A process that links or opens libcuda.so.1 must find this file under that name.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    println!("cargo:rerun-if-changed=build.rs");
}
