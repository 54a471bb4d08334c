fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnvinfer.so.10");
    println!("cargo:rerun-if-changed=build.rs");
}
