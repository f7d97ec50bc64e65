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

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, IsCa, Issuer, KeyPair};

    use super::*;

    fn issued(subject: DistinguishedName, issuer: DistinguishedName) -> Vec<u8> {
        let mut authority = CertificateParams::default();
        authority.distinguished_name = issuer;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = Issuer::new(authority, KeyPair::generate().unwrap());
        let mut own = CertificateParams::default();
        own.distinguished_name = subject;
        own.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().der().to_vec()
    }

    fn name(parts: &[(DnType, &str)]) -> DistinguishedName {
        let mut name = DistinguishedName::new();
        parts.iter().for_each(|(kind, value)| name.push(kind.clone(), DnValue::Utf8String((*value).to_owned())));
        name
    }

    fn subject(parts: &[(DnType, &str)]) -> String {
        Names::of(&issued(name(parts), name(&[]))).unwrap().subject
    }

    /// Whatever is in a name, nobody can pass for somebody else by it.
    #[test]
    fn what_means_something_in_the_text_of_a_name_is_escaped() {
        for (value, text) in [
            ("a,b+c\"d\\e<f>g;h=i", r#"CN=a\,b\+c\"d\\e\<f\>g\;h=i"#),
            ("CN=x,O=y", r"CN=CN=x\,O=y"),
            (" front", r"CN=\ front"),
            ("back ", r"CN=back\ "),
            ("#hash", r"CN=\#hash"),
            ("a#b c", "CN=a#b c"),
            ("nul\0byte", r"CN=nul\00byte"),
            ("line\nbreak\x7f", r"CN=line\0abreak\7f"),
            ("Łódź ☃", "CN=Łódź ☃"),
            ("", "CN="),
        ] {
            assert_eq!(subject(&[(DnType::CommonName, value)]), text);
        }
    }

    #[test]
    fn the_most_specific_part_is_first_and_a_name_may_have_none() {
        let parts = [
            (DnType::CountryName, "US"),
            (DnType::OrganizationName, "Big, Co"),
            (DnType::OrganizationalUnitName, "Ops"),
            (DnType::CommonName, "x"),
        ];
        assert_eq!(subject(&parts), r"CN=x,OU=Ops,O=Big\, Co,C=US");
        assert_eq!(subject(&[]), "");
        let certificate = issued(name(&[]), name(&[(DnType::CommonName, "who signed")]));
        assert_eq!(Names::of(&certificate).unwrap().issuer, "CN=who signed");
    }

    #[test]
    fn what_has_no_text_is_shown_by_its_bytes() {
        let odd = DnType::CustomDnType(vec![1, 2, 3, 4, 5]);
        assert_eq!(subject(&[(odd, "odd")]), "1.2.3.4.5=#0c036f6464");
        let mut wide = DistinguishedName::new();
        wide.push(DnType::CommonName, DnValue::BmpString("a☃".try_into().unwrap()));
        let names = Names::of(&issued(wide, name(&[]))).unwrap();
        assert_eq!(names.subject, "2.5.4.3=#1e0400612603");
    }

    #[test]
    fn other_texts_than_utf_8_are_read() {
        let mut old = DistinguishedName::new();
        old.push(DnType::OrganizationName, DnValue::TeletexString("tele".try_into().unwrap()));
        old.push(DnType::StateOrProvinceName, DnValue::PrintableString("print".try_into().unwrap()));
        old.push(DnType::CommonName, DnValue::Ia5String("ia5@x".try_into().unwrap()));
        let names = Names::of(&issued(old, name(&[]))).unwrap();
        assert_eq!(names.subject, "CN=ia5@x,ST=print,O=tele");
    }

    #[test]
    fn what_is_no_certificate_has_no_names() {
        let certificate = issued(name(&[(DnType::CommonName, "whole")]), name(&[]));
        for end in 0..certificate.len() {
            assert_eq!(Names::of(&certificate[..end]), None);
        }
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let mut changed = certificate.clone();
            let at = random.usize(0..changed.len());
            changed[at] = random.u8(..);
            // Whatever it says now.
            let _ = Names::of(&changed);
        }
    }
}
