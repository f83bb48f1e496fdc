//! Trees in, an image out.
