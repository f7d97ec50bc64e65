//! The client's end of TLS with certificates, by rustls.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    Resumption, UnbufferedClientConnection, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::certificates::{CertificatesError, Part, own, provider, revoked, roots, wrong};
use super::names::Revoked;
use super::session::{Session, failed};
use super::stream::secure;
use super::{Connector, Securing};
use crate::transport::Transport;

/// What a client with certificates is made of, as files of PEM blocks.
#[derive(Clone, Copy)]
pub struct ClientPem<'a> {
    /// The certificates of the authorities that servers' certificates are signed by.
    pub authorities: &'a [u8],
    /// The client's own certificate and its key, for servers that want to see one.
    pub own: Option<(&'a [u8], &'a [u8])>,
    /// Certificates that were taken back.
    pub revoked: Option<&'a [u8]>,
}

/// What is looked at of a server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing: anybody may be the server.
    Nothing,
    /// That an authority has signed it, that it is valid now and was not revoked.
    Signature,
    /// That, and that it is of the server with this name or address.
    Name(String),
}

/// Goes to servers that have certificates: TLS 1.2 and 1.3.
#[derive(Clone)]
pub struct ServerCertificates {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for ServerCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerCertificates of {:?}", self.name)
    }
}

impl ServerCertificates {
    /// Errors: a file has nothing of what it should have, or what cannot be used; the name to look for can be nobody's, which is
    /// said of the authorities.
    pub fn new(pem: ClientPem<'_>, check: &Check) -> Result<ServerCertificates, CertificatesError> {
        let provider = Arc::new(provider());
        let name = match check {
            Check::Name(name) => ServerName::try_from(name.clone())
                .map_err(|_| wrong(Part::Authorities, format_args!("no certificate can be for \"{name}\"")))?,
            // Some name is needed, and is not said to the server.
            Check::Nothing | Check::Signature => ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
        };
        let verifier = Verifier {
            check: check.clone(),
            roots: if *check == Check::Nothing { RootCertStore::empty() } else { roots(pem.authorities)? },
            revoked: revoked(pem.revoked)?,
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| wrong(Part::Authorities, error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match pem.own {
            Some((certificate, key)) => {
                let own = own(&provider, certificate, key)?;
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own)))
            }
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(ServerCertificates { config: Arc::new(config), name })
    }
}

impl Connector for ServerCertificates {
    fn connect(&self, transport: Box<dyn Transport>) -> Securing {
        let records = UnbufferedClientConnection::new(Arc::clone(&self.config), self.name.clone());
        secure(records.map(Session::new).map_err(failed), transport)
    }
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    roots: RootCertStore,
    revoked: Revoked,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.check == Check::Nothing {
            return Ok(ServerCertVerified::assertion());
        }
        let certificate = ParsedCertificate::try_from(own)?;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, between, now, self.algorithms.all)?;
        self.revoked.has_none_of(own, between)?;
        if let Check::Name(_) = self.check {
            verify_server_name(&certificate, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
