//! The frame codec.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cube_protocol::fuzzing::frame(input));
