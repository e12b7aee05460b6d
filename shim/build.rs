//! Generates the messages and the ttrpc service from `proto/`, as cube-protocol does. containerd.proto has
//! messages alone: gRPC needs no code of its own for a call.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const FILES: [&str; 2] = ["proto/sandbox.proto", "proto/containerd.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    FILES.iter().for_each(|file| println!("cargo:rerun-if-changed={file}"));
    let out = PathBuf::from(env::var("OUT_DIR")?).join("proto");
    fs::create_dir_all(&out)?;
    Codegen::new()
        .inputs(FILES)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()?;
    // `include!` takes no inner attributes or inner doc comments (rust-lang/rust#18810).
    for entry in fs::read_dir(&out)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let kept: Vec<&str> =
            text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).collect();
        fs::write(&path, kept.join("\n"))?;
    }
    Ok(())
}
