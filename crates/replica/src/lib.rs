//! holdfast-replica
