//! `gzip`: unpacks gzip files (see `unpacked.rs`).
//! Source: nbdkit filters/gzip/gzip.c, nbdkit-gzip-filter.pod; RFC 1952.

use std::io::BufRead;
use std::sync::Arc;

use flate2::bufread::GzDecoder;
use nbdcaptive_actors::device::{Exports, ThreadModel};

use super::unpacked::{self, Format};
use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "gzip",
    summary: "unpack a gzip file, read-only

        All of it is unpacked into a temporary file when the first client comes, because the size cannot be known
        before. The file is in `$TMPDIR`, or `/var/tmp`, has no name, and is gone at the end.
        nbdcaptive-xz-filter(1) needs no such file.

        # Examples

            nbdcaptive --filter=gzip file disk.img.gz \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Gzip;

impl Format for Gzip {
    const NAME: &'static str = ABOUT.name;
    const MAGIC: &'static [u8] = &[0x1f, 0x8b];
    type Member<R: BufRead> = GzDecoder<R>;

    fn member<R: BufRead>(input: R) -> GzDecoder<R> {
        GzDecoder::new(input)
    }

    fn rest<R: BufRead>(member: GzDecoder<R>) -> R {
        member.into_inner()
    }
}

impl Filter for Gzip {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        unpacked::exports::<Gzip>(next, lifetime)
    }
}
