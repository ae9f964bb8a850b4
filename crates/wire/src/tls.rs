//! Mutual TLS 1.3 between nodes of one cluster, and who the peer is.

use std::sync::Arc;

use holdfast_types::{ClusterId, NodeName};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::pki::{Credentials, PkiError, SERVER_NAME};

/// A node's TLS, both directions.
#[derive(Clone)]
pub struct Tls {
    cluster: ClusterId,
    pub(crate) acceptor: TlsAcceptor,
    pub(crate) connector: TlsConnector,
}

fn bad(error: impl std::fmt::Display) -> PkiError {
    PkiError(error.to_string())
}

impl Tls {
    /// From a node's credentials.
    pub fn new(cluster: ClusterId, credentials: &Credentials) -> Result<Self, PkiError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(credentials.authority.as_bytes()).map_err(bad)?)
            .map_err(bad)?;
        let roots = Arc::new(roots);
        let chain = vec![CertificateDer::from_pem_slice(credentials.certificate.as_bytes()).map_err(bad)?];
        let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes()).map_err(bad)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_client_cert_verifier(verifier.map_err(bad)?)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(bad)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(bad)?;
        Ok(Self {
            cluster,
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }

    /// Whether these credentials are those of `node` in this cluster: with others no peer would listen.
    pub fn check_own(&self, credentials: &Credentials, node: &NodeName) -> Result<(), PkiError> {
        let certificate = CertificateDer::from_pem_slice(credentials.certificate.as_bytes()).map_err(bad)?;
        let named = self.node_of(Some(&[certificate]))?;
        if named == node.to_string() {
            return Ok(());
        }
        Err(bad(format!("the certificate is that of node {named}, not of {node}")))
    }

    pub(crate) fn server_name() -> ServerName<'static> {
        ServerName::try_from(SERVER_NAME).expect("the fixed name is a valid DNS name")
    }

    /// The node that a verified certificate names; refused if it is of another cluster.
    pub(crate) fn node_of(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<String, PkiError> {
        let certificate =
            certificates.and_then(<[_]>::first).ok_or_else(|| bad("the peer shows no certificate"))?;
        node_in(self.cluster, certificate)
    }
}

/// The node of a cluster that a certificate names.
pub(crate) fn node_in(cluster: ClusterId, certificate: &CertificateDer<'_>) -> Result<String, PkiError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(bad)?;
    let names = parsed.subject_alternative_name().map_err(bad)?.ok_or_else(|| bad("it names no node"))?;
    let prefix = format!("holdfast://{:032x}/node/", cluster.0);
    let node = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(&prefix),
        _ => None,
    });
    node.map(str::to_owned).ok_or_else(|| bad("the certificate names no node of this cluster"))
}
