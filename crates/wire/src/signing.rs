//! What a node signs with the key of its certificate, and who has signed.

use std::sync::Arc;
use std::time::Duration;

use holdfast_types::{ClusterId, NodeName};
use rustls::SignatureScheme;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, SignatureVerificationAlgorithm, UnixTime};
use rustls::sign::SigningKey;
use webpki::ring::{ECDSA_P256_SHA256, ECDSA_P384_SHA384, ED25519};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::pki::{Credentials, PkiError};
use crate::tls::node_in;

/// How nodes sign: by the kind of their key.
const SCHEMES: [SignatureScheme; 3] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
];
/// The same, to those who verify.
const ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 3] = [ECDSA_P256_SHA256, ECDSA_P384_SHA384, ED25519];

fn bad(error: impl std::fmt::Display) -> PkiError {
    PkiError(error.to_string())
}

/// Signs as a node.
pub struct Signer {
    key: Arc<dyn SigningKey>,
    certificate: String,
}

impl Signer {
    /// With a node's credentials.
    pub fn new(credentials: &Credentials) -> Result<Self, PkiError> {
        let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes()).map_err(bad)?;
        let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(bad)?;
        Ok(Self { key, certificate: credentials.certificate.clone() })
    }

    /// The node's certificate as PEM: who verifies needs it.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The signature of a message.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, PkiError> {
        let signer = self.key.choose_scheme(&SCHEMES);
        let signer =
            signer.ok_or_else(|| bad("the node's key is of a kind that signs nothing else than TLS"))?;
        signer.sign(message).map_err(bad)
    }
}

/// A message, its signature, and the certificate of who is said to have signed it, as PEM.
pub struct Signed<'s> {
    /// What was signed.
    pub message: &'s [u8],
    /// The signature.
    pub signature: &'s [u8],
    /// The certificate.
    pub certificate: &'s str,
}

impl Signed<'_> {
    /// The node of this cluster that has signed it, by its authority's certificate (PEM), `now` since 1970.
    pub fn signer(&self, cluster: ClusterId, authority: &str, now: Duration) -> Result<NodeName, PkiError> {
        let authority = CertificateDer::from_pem_slice(authority.as_bytes()).map_err(bad)?;
        let anchor = anchor_from_trusted_cert(&authority).map_err(bad)?;
        let der = CertificateDer::from_pem_slice(self.certificate.as_bytes()).map_err(bad)?;
        let certificate = EndEntityCert::try_from(&der).map_err(bad)?;
        let now = UnixTime::since_unix_epoch(now);
        certificate
            .verify_for_usage(ALL_VERIFICATION_ALGS, &[anchor], &[], now, KeyUsage::client_auth(), None, None)
            .map_err(|error| bad(format!("the signer's certificate is not of this cluster: {error}")))?;
        let matches = |algorithm: &&dyn SignatureVerificationAlgorithm| {
            certificate.verify_signature(*algorithm, self.message, self.signature).is_ok()
        };
        if !ALGORITHMS.iter().any(matches) {
            return Err(bad("the signature is not that of what is signed"));
        }
        node_in(cluster, &der).map(NodeName::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;

    const CLUSTER: ClusterId = ClusterId(7);
    const NOW: Duration = Duration::from_secs(1_796_000_000);

    fn authority(cluster: ClusterId) -> Authority {
        Authority::create(cluster).expect("an authority")
    }

    #[test]
    fn only_who_has_signed_exactly_this_in_this_cluster_is_named() {
        let own = authority(CLUSTER);
        let credentials = own.issue(&NodeName::new("a")).expect("a certificate");
        let signer = Signer::new(&credentials).expect("a key");
        let signature = signer.sign(b"said").expect("signs");
        let signed = |message, signature, certificate| Signed { message, signature, certificate };
        let it = signed(b"said", &signature, signer.certificate());
        assert_eq!(it.signer(CLUSTER, own.certificate(), NOW).expect("it is signed"), NodeName::new("a"));

        let altered = signed(b"Said", &signature, signer.certificate());
        let error = altered.signer(CLUSTER, own.certificate(), NOW).expect_err("another message");
        assert!(error.to_string().contains("not that of what is signed"), "{error}");
        let mut broken = signature.clone();
        broken[10] ^= 1;
        assert!(
            signed(b"said", &broken, signer.certificate()).signer(CLUSTER, own.certificate(), NOW).is_err()
        );
        let other = own.issue(&NodeName::new("b")).expect("a certificate");
        assert!(
            signed(b"said", &signature, &other.certificate).signer(CLUSTER, own.certificate(), NOW).is_err()
        );

        // Another cluster's authority, even for a node of the same name, and even of the same number.
        let foreign = authority(CLUSTER).issue(&NodeName::new("a")).expect("a certificate");
        let theirs = Signer::new(&foreign).expect("a key").sign(b"said").expect("signs");
        let error = signed(b"said", &theirs, &foreign.certificate).signer(CLUSTER, own.certificate(), NOW);
        assert!(error.expect_err("foreign").to_string().contains("not of this cluster"));
        assert!(it.signer(ClusterId(8), own.certificate(), NOW).is_err(), "it names another cluster");
        for certificate in ["", "no PEM", own.certificate()] {
            assert!(
                signed(b"said", &signature, certificate).signer(CLUSTER, own.certificate(), NOW).is_err()
            );
        }
    }
}
