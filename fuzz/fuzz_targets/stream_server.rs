//! The agent's stream server, against a host that is hostile or broken.

#![no_main]

use nix::sys::signal::{SigSet, Signal};

libfuzzer_sys::fuzz_target!(
    init: {
        // As in every program that begins with Rust's `main`, and so in the agent: EPIPE, and no signal.
        let mut pipe = SigSet::empty();
        pipe.add(Signal::SIGPIPE);
        pipe.thread_block().expect("a signal that exists can be blocked");
    },
    |input: &[u8]| cube_agent::stdio::fuzzing::stream_server(input)
);
