//! holdfast-catalog
