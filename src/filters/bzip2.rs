//! `bzip2`: unpacks bzip2 files (see `unpacked.rs`).
//! Source: nbdkit filters/bzip2/bzip2.c, nbdkit-bzip2-filter.pod.

use std::io::BufRead;
use std::sync::Arc;

use ::bzip2::bufread::BzDecoder;
use nbdcaptive_actors::device::{Exports, ThreadModel};

use super::unpacked::{self, Format};
use crate::layer::{About, ConfigError, Filter, Lifetime};

/// See the module.
pub static ABOUT: About = About {
    name: "bzip2",
    summary: "unpack a bzip2 file, read-only

        All of it is unpacked into a temporary file when the first client comes, because the size cannot be known
        before. The file is in `$TMPDIR`, or `/var/tmp`, has no name, and is gone at the end.
        nbdcaptive-xz-filter(1) needs no such file.

        # Examples

            nbdcaptive --filter=bzip2 file disk.img.bz2 \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Bzip2;

impl Format for Bzip2 {
    const NAME: &'static str = ABOUT.name;
    const MAGIC: &'static [u8] = b"BZh";
    type Member<R: BufRead> = BzDecoder<R>;

    fn member<R: BufRead>(input: R) -> BzDecoder<R> {
        BzDecoder::new(input)
    }

    fn rest<R: BufRead>(member: BzDecoder<R>) -> R {
        member.into_inner()
    }
}

impl Filter for Bzip2 {
    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        unpacked::exports::<Bzip2>(next, lifetime)
    }
}
