//! The guest as a machine: its file systems, network, identity, and figures about it.

pub mod identity;
pub mod info;
pub mod network;
pub mod paths;
pub mod storage;
