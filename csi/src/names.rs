//! Names and ids of volumes.

use holdfast_types::{VolumeId, limits};

/// The catalog's name for a volume that a CO calls `name`: the same where the catalog's rules allow it, else a digest.
/// CSI allows nearly any text of up to 128 bytes.
pub(crate) fn volume_name(name: &str) -> String {
    if limits::check_name("volume", name).is_ok() {
        return name.to_owned();
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("csi-{hex}")
}

/// Whether a text can be a volume's id. Names are none: a handle must not reach a volume that merely has that name.
pub(crate) fn is_volume_id(text: &str) -> bool {
    text.parse::<VolumeId>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_csi_allows_has_a_name_in_the_catalog() {
        assert_eq!(volume_name("pvc-6d1f"), "pvc-6d1f");
        let odd = ["größe", "a b", "-a", "ж".repeat(64).leak()];
        for name in odd {
            let mapped = volume_name(name);
            assert!(limits::check_name("volume", &mapped).is_ok(), "{mapped}");
            assert_eq!(mapped, volume_name(name));
        }
        assert_ne!(volume_name("a b"), volume_name("a  b"));
    }
}
