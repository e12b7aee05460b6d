//! Parts of the shim, shared by its two programs.
