//! Lookup, attributes, directories, reads and xattrs of one mounted image.
