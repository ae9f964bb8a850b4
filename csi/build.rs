//! Compiles the CSI services and the admin API's client.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto");
    let csi = protox::compile(["csi/csi.proto"], ["../proto"])?;
    tonic_prost_build::configure().compile_fds(csi)?;
    let admin = protox::compile(["holdfast/admin.proto"], ["../proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(admin)?;
    Ok(())
}
