//! The cluster's certificates: an authority made when the cluster is, and a certificate per node that names the
//! cluster and the node in a URI (`holdfast://<cluster>/node/<name>`).

use holdfast_types::{ClusterId, NodeName};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The name that every node's certificate carries beside its own, which TLS clients ask for; who the peer is says the
/// URI.
pub const SERVER_NAME: &str = "node.holdfast.internal";

/// A certificate could not be made or read.
#[derive(Debug, thiserror::Error)]
#[error("the cluster's certificates: {0}")]
pub struct PkiError(pub String);

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self(error.to_string())
    }
}

/// What a node shows to its peers, as PEM.
#[derive(Clone)]
pub struct Credentials {
    /// The authority's certificate.
    pub authority: String,
    /// The node's certificate.
    pub certificate: String,
    /// The node's key. Secret.
    pub key: String,
}

/// The cluster's certificate authority.
pub struct Authority {
    cluster: ClusterId,
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    key: String,
}

fn authority_params(cluster: ClusterId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("holdfast cluster {:032x}", cluster.0));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// The URI that names a node.
pub fn node_uri(cluster: ClusterId, node: &NodeName) -> String {
    format!("holdfast://{:032x}/node/{node}", cluster.0)
}

impl Authority {
    /// A new authority with a new key.
    pub fn create(cluster: ClusterId) -> Result<Self, PkiError> {
        let key = KeyPair::generate()?;
        let certificate = authority_params(cluster).self_signed(&key)?.pem();
        Self::load(cluster, certificate, &key.serialize_pem())
    }

    /// The authority with this certificate and key, both PEM.
    pub fn load(cluster: ClusterId, certificate: String, key: &str) -> Result<Self, PkiError> {
        let issuer = Issuer::new(authority_params(cluster), KeyPair::from_pem(key)?);
        Ok(Self { cluster, issuer, certificate, key: key.to_owned() })
    }

    /// Its certificate as PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its key as PEM. Secret.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// A certificate for a node, with a new key.
    pub fn issue(&self, node: &NodeName) -> Result<Credentials, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, node.to_string());
        params.subject_alt_names.push(SanType::URI(node_uri(self.cluster, node).try_into()?));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Credentials { authority: self.certificate.clone(), certificate, key: key.serialize_pem() })
    }
}
