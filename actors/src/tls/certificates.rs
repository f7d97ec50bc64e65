//! The server's end of TLS with certificates, by rustls.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CipherSuite, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};

use super::names::Revoked;
use super::session::{Session, failed};
use super::stream::secure;
use super::{Acceptor, Securing};
use crate::transport::Transport;

/// What a server with certificates is made of, as files of PEM blocks. Text around the blocks, and blocks of other kinds, are
/// passed over.
#[derive(Clone, Copy)]
pub struct Pem<'a> {
    /// The certificates of the authorities that clients' certificates are signed by.
    pub authorities: &'a [u8],
    /// The server's certificate, and those between it and an authority that clients know.
    pub certificate: &'a [u8],
    /// The server's private key: PKCS #8, or PKCS #1 or SEC 1, not encrypted.
    pub key: &'a [u8],
    /// Certificates that were taken back.
    pub revoked: Option<&'a [u8]>,
}

/// One of the files of a [`Pem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// [`Pem::authorities`]
    Authorities,
    /// [`Pem::certificate`]
    Certificate,
    /// [`Pem::key`]
    Key,
    /// [`Pem::revoked`]
    Revoked,
}

/// Why there is no server with these files.
#[derive(Debug)]
pub struct CertificatesError {
    /// Which file is at fault.
    pub part: Part,
    /// What is wrong with it, for people. Nothing of a key is in it.
    pub why: String,
}

impl fmt::Display for CertificatesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for CertificatesError {}

/// Lets clients in by certificates: TLS 1.2 and 1.3.
#[derive(Clone)]
pub struct Certificates(Arc<ServerConfig>);

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates")
    }
}

impl Certificates {
    /// A server with these files. With `verify_peer`, clients must show a certificate that one of the authorities has signed,
    /// that is valid now, and that was not revoked; without, they are not asked for any.
    ///
    /// Errors: a file has nothing of what it should have, or what cannot be used; the key is not that of the certificate.
    pub fn new(pem: Pem<'_>, verify_peer: bool) -> Result<Certificates, CertificatesError> {
        let provider = Arc::new(provider());
        let roots = roots(pem.authorities)?;
        let revoked = revoked(pem.revoked)?;
        let own = own(&provider, pem.certificate, pem.key)?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| wrong(Part::Certificate, error))?;
        let builder = if verify_peer {
            let web = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| wrong(Part::Authorities, error))?;
            builder.with_client_cert_verifier(Arc::new(Verifier { web, revoked }))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
        // The server's first choice is the fastest, where the processor does it by itself; where it does not, the client knows
        // best.
        config.ignore_client_order = has_fast_aes();
        // Nothing to come back with: a client is asked who it is each time. NBD clients stay for long.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(Certificates(Arc::new(config)))
    }
}

impl Acceptor for Certificates {
    fn accept(&self, transport: Box<dyn Transport>) -> Securing {
        let records = UnbufferedServerConnection::new(Arc::clone(&self.0));
        secure(records.map(Session::new).map_err(failed), transport)
    }
}

/// aws-lc-rs: about twice as fast as ring where the processor has wide AES, and it knows the curve P-521, which certtool
/// makes keys of when it is asked to. It is built with a C compiler alone.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    // 128 bits are as safe as anything else in the exchange, and a third faster than 256.
    let order = |suite: CipherSuite| match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => 2,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => 3,
        _ => 4,
    };
    provider.cipher_suites.sort_by_key(|suite| order(suite.suite()));
    provider
}

/// Whether the processor has instructions for AES-GCM.
pub(super) fn has_fast_aes() -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

pub(super) fn wrong(part: Part, why: impl fmt::Display) -> CertificatesError {
    CertificatesError { part, why: why.to_string() }
}

pub(super) fn no_pem(part: Part, error: pem::Error) -> CertificatesError {
    let why = match (part, error) {
        (Part::Key, pem::Error::NoItemsFound) => "there is no private key in it".to_owned(),
        (_, pem::Error::NoItemsFound) => "there is no certificate in it".to_owned(),
        // What it says could have a part of the file in it.
        _ => "it is not in PEM format".to_owned(),
    };
    CertificatesError { part, why }
}

pub(super) fn certificates(part: Part, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificatesError> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| no_pem(part, error))?;
    if found.is_empty() { Err(no_pem(part, pem::Error::NoItemsFound)) } else { Ok(found) }
}

pub(super) fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, CertificatesError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| {
        let is_encrypted = pem.windows(b"ENCRYPTED".len()).any(|word| word == b"ENCRYPTED");
        match error {
            pem::Error::NoItemsFound if is_encrypted => {
                wrong(Part::Key, "the key is encrypted, and nobody is there to ask for a password")
            }
            error => no_pem(Part::Key, error),
        }
    })
}

/// Who is trusted to sign.
pub(super) fn roots(pem: &[u8]) -> Result<RootCertStore, CertificatesError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(Part::Authorities, pem)? {
        roots.add(authority).map_err(|error| wrong(Part::Authorities, error))?;
    }
    Ok(roots)
}

/// What was taken back.
pub(super) fn revoked(pem: Option<&[u8]>) -> Result<Revoked, CertificatesError> {
    let mut revoked = Revoked::default();
    for list in CertificateRevocationListDer::pem_slice_iter(pem.unwrap_or_default()) {
        let list = list.map_err(|error| no_pem(Part::Revoked, error))?;
        revoked.add(&list).map_err(|error| wrong(Part::Revoked, format_args!("no revocation list: {error}")))?;
    }
    Ok(revoked)
}

/// A certificate with its key.
pub(super) fn own(
    provider: &CryptoProvider,
    certificate: &[u8],
    private: &[u8],
) -> Result<CertifiedKey, CertificatesError> {
    let chain = certificates(Part::Certificate, certificate)?;
    let private = provider.key_provider.load_private_key(key(private)?);
    let own = CertifiedKey::new(chain, private.map_err(|error| wrong(Part::Key, error))?);
    // What rustls does not understand of a certificate is the other end's to judge.
    if let Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) = own.keys_match() {
        return Err(wrong(Part::Key, "it is not the key of the certificate"));
    }
    Ok(own)
}

/// What rustls says of clients' certificates, and that they were not revoked.
#[derive(Debug)]
struct Verifier {
    web: Arc<dyn ClientCertVerifier>,
    revoked: Revoked,
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.web.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.web.verify_client_cert(own, between, now)?;
        self.revoked.has_none_of(own, between)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.web.supported_verify_schemes()
    }
}
