//! The real environment.
