//! holdfast-protocol
