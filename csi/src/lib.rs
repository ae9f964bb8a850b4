//! holdfast-csi
