//! What certificates say of who has them, and which of them were revoked.
//!
//! Only what is asked for here is read of them, so that certificates of any version and age can be asked; whether they are
//! to be trusted, rustls decides.

use std::collections::HashSet;

use rustls::CertificateError;
use rustls::pki_types::CertificateDer;
use x509_cert::der::asn1::AnyRef;
use x509_cert::der::{self, Decode, Reader, SliceReader, Tag, Tagged};
use x509_cert::name::Name;

use super::Names;

/// The parts of a certificate, each in DER. Source: RFC 5280 section 4.1.
struct Parts<'a> {
    serial: &'a [u8],
    issuer: &'a [u8],
    subject: &'a [u8],
}

impl<'a> Parts<'a> {
    fn read(certificate: &'a [u8]) -> der::Result<Parts<'a>> {
        let mut signed = SliceReader::new(inner(certificate)?)?;
        let mut body = SliceReader::new(AnyRef::decode(&mut signed)?.value())?;
        if body.peek_byte() == Some(VERSION) {
            let _version = body.tlv_bytes()?;
        }
        let serial = AnyRef::decode(&mut body)?;
        serial.tag().assert_eq(Tag::Integer)?;
        let _algorithm = body.tlv_bytes()?;
        let issuer = body.tlv_bytes()?;
        let _validity = body.tlv_bytes()?;
        let subject = body.tlv_bytes()?;
        Ok(Parts { serial: serial.value(), issuer, subject })
    }
}

/// The tag in front of a certificate's version, which the first version is without.
const VERSION: u8 = 0xa0;
const INTEGER: u8 = 0x02;
const SEQUENCE: u8 = 0x30;

/// What is in a sequence.
fn inner(sequence: &[u8]) -> der::Result<&[u8]> {
    let any = AnyRef::from_der(sequence)?;
    any.tag().assert_eq(Tag::Sequence)?;
    Ok(any.value())
}

impl Names {
    /// Those in a certificate, in DER. `None` where it cannot be read.
    pub(super) fn of(certificate: &[u8]) -> Option<Names> {
        let parts = Parts::read(certificate).ok()?;
        let text = |name| Name::from_der(name).ok().map(|name| name.to_string());
        Some(Names { subject: text(parts.subject)?, issuer: text(parts.issuer)? })
    }
}

/// Certificates that were taken back, by who signed them and under what number.
///
/// As in nbdkit, a list is believed because it lies beside the server's own files: it counts also where the authority's
/// certificate does not say that it may sign lists, and after the day on which the next one was due.
#[derive(Debug, Default)]
pub(super) struct Revoked(HashSet<(Vec<u8>, Vec<u8>)>);

impl Revoked {
    /// Adds a list, in DER. Errors: it is none. Source: RFC 5280 section 5.1.
    pub(super) fn add(&mut self, list: &[u8]) -> der::Result<()> {
        let mut signed = SliceReader::new(inner(list)?)?;
        let mut body = SliceReader::new(inner(signed.tlv_bytes()?)?)?;
        if body.peek_byte() == Some(INTEGER) {
            let _version = body.tlv_bytes()?;
        }
        let _algorithm = body.tlv_bytes()?;
        let issuer = body.tlv_bytes()?;
        inner(issuer)?;
        // When this list was made, and when the next is due.
        while matches!(AnyRef::decode(&mut body.clone()), Ok(time) if is_time(time.tag())) {
            body.tlv_bytes()?;
        }
        let is_empty = body.peek_byte() != Some(SEQUENCE);
        if is_empty {
            return Ok(());
        }
        let mut entries = SliceReader::new(inner(body.tlv_bytes()?)?)?;
        while !entries.is_finished() {
            let mut entry = SliceReader::new(inner(entries.tlv_bytes()?)?)?;
            let serial = AnyRef::decode(&mut entry)?;
            serial.tag().assert_eq(Tag::Integer)?;
            self.0.insert((issuer.to_vec(), serial.value().to_vec()));
        }
        Ok(())
    }

    /// Whether none of a chain of certificates was taken back: the `own` of the other end, and those `between` it and an
    /// authority.
    pub(super) fn has_none_of(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        match std::iter::once(own).chain(between).any(|certificate| self.has(certificate)) {
            true => Err(CertificateError::Revoked.into()),
            false => Ok(()),
        }
    }

    /// Whether a certificate, in DER, was taken back. One that cannot be read is as good as that.
    fn has(&self, certificate: &[u8]) -> bool {
        if self.0.is_empty() {
            return false;
        }
        Parts::read(certificate).map_or(true, |parts| self.0.contains(&(parts.issuer.to_vec(), parts.serial.to_vec())))
    }
}

fn is_time(tag: Tag) -> bool {
    matches!(tag, Tag::UtcTime | Tag::GeneralizedTime)
}
