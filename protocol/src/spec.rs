//! `config.json` on its way into the guest: how long it may be, and how it is cut.

/// Most bytes of a `config.json`. Those that people write by hand have kilobytes; tools that put data into
/// annotations or the environment reach megabytes.
pub const BYTES_MAX: usize = 32 << 20;

/// Most bytes that a Create carries itself. ttrpc takes messages of 4 MiB.
pub const WHOLE_MAX: usize = 3 << 20;

/// Bytes of a part of a longer one, but for the last.
pub const PART: usize = 1 << 20;
