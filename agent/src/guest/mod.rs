//! The guest as a machine: its file systems, network, identity, figures about it, and how it is brought
//! to rest and set going again.

pub mod active_clock;
pub mod clock;
mod disks;
pub mod entropy;
pub mod gate;
pub mod identity;
pub mod info;
mod netlink;
pub mod network;
pub mod paths;
pub mod quiesce;
pub mod storage;
