//! Compiles the admin API.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto/holdfast");
    let files = protox::compile(["holdfast/admin.proto"], ["../../proto"])?;
    tonic_prost_build::configure().type_attribute(".", "#[derive(serde::Serialize)]").compile_fds(files)?;
    Ok(())
}
