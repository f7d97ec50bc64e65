//! The handshake: greeting, options, option replies. Source: NBD doc/proto.md "Fixed newstyle negotiation", "Option types".

use super::Reader;
use super::constants::*;

/// The length of an option's header, in bytes.
pub const OPTION_HEADER: usize = 16;
/// The most option data that is read into memory. The largest sensible option is a name with some queries.
pub const MAX_OPTION_DATA: u32 = 64 * 1024;

/// The server's first bytes. `flags` are `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`.
pub fn greeting(flags: u16) -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&NBD_OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// What precedes an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// `NBD_OPT_*`, known or not.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// `None` where the bytes do not start with the option magic: the stream is lost then.
    pub fn parse(bytes: &[u8; OPTION_HEADER]) -> Option<OptionHeader> {
        let mut reader = Reader(bytes);
        if reader.u64()? != NBD_OPTION_MAGIC {
            return None;
        }
        Some(OptionHeader { option: reader.u32()?, length: reader.u32()? })
    }
}

/// An option, as the client meant it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeOption {
    /// `NBD_OPT_EXPORT_NAME`
    ExportName(Vec<u8>),
    /// `NBD_OPT_ABORT`
    Abort,
    /// `NBD_OPT_LIST`
    List,
    /// `NBD_OPT_STARTTLS`
    StartTls,
    /// `NBD_OPT_INFO`
    Info(ExportQuery),
    /// `NBD_OPT_GO`
    Go(ExportQuery),
    /// `NBD_OPT_STRUCTURED_REPLY`
    StructuredReply,
    /// `NBD_OPT_LIST_META_CONTEXT`
    ListMetaContext(MetaContextQuery),
    /// `NBD_OPT_SET_META_CONTEXT`
    SetMetaContext(MetaContextQuery),
    /// `NBD_OPT_EXTENDED_HEADERS`
    ExtendedHeaders,
    /// One that this server does not know.
    Unknown,
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery {
    /// The export's name.
    pub name: Vec<u8>,
    /// `NBD_INFO_*` that the client would like to have.
    pub infos: Vec<u16>,
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextQuery {
    /// The export's name.
    pub name: Vec<u8>,
    /// Context names, or a namespace and a colon.
    pub queries: Vec<Vec<u8>>,
}

/// The most queries that one option may have.
pub const MAX_QUERIES: u32 = 1024;

/// Why an option's data is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// `NBD_REP_ERR_INVALID` or `NBD_REP_ERR_TOO_BIG`.
    pub reply: u32,
    /// For the client and the log.
    pub why: &'static str,
}

const fn invalid(why: &'static str) -> Malformed {
    Malformed { reply: NBD_REP_ERR_INVALID, why }
}

impl HandshakeOption {
    /// Reads the data of `option`, all of it, at most [`MAX_OPTION_DATA`] bytes.
    pub fn parse(option: u32, data: &[u8]) -> Result<HandshakeOption, Malformed> {
        let empty = |parsed| if data.is_empty() { Ok(parsed) } else { Err(invalid("the option takes no data")) };
        match option {
            NBD_OPT_EXPORT_NAME => string(data).map(HandshakeOption::ExportName),
            // The specification lets a client say why; the server need not look.
            NBD_OPT_ABORT => Ok(HandshakeOption::Abort),
            NBD_OPT_LIST => empty(HandshakeOption::List),
            NBD_OPT_STARTTLS => empty(HandshakeOption::StartTls),
            NBD_OPT_INFO => export_query(data).map(HandshakeOption::Info),
            NBD_OPT_GO => export_query(data).map(HandshakeOption::Go),
            NBD_OPT_STRUCTURED_REPLY => empty(HandshakeOption::StructuredReply),
            NBD_OPT_LIST_META_CONTEXT => meta_context_query(data).map(HandshakeOption::ListMetaContext),
            NBD_OPT_SET_META_CONTEXT => meta_context_query(data).map(HandshakeOption::SetMetaContext),
            NBD_OPT_EXTENDED_HEADERS => empty(HandshakeOption::ExtendedHeaders),
            _ => Ok(HandshakeOption::Unknown),
        }
    }
}

const SHORT: Malformed = invalid("the option's data ends too early");

fn string(bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
    if bytes.len() > NBD_MAX_STRING {
        return Err(invalid("a string is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(invalid("a string may not include NUL bytes"));
    }
    Ok(bytes.to_vec())
}

fn counted_string(reader: &mut Reader<'_>) -> Result<Vec<u8>, Malformed> {
    let length = reader.u32().ok_or(SHORT)? as usize;
    string(reader.bytes(length).ok_or(SHORT)?)
}

fn export_query(data: &[u8]) -> Result<ExportQuery, Malformed> {
    let mut reader = Reader(data);
    let name = counted_string(&mut reader)?;
    let count = usize::from(reader.u16().ok_or(SHORT)?);
    if reader.0.len() != 2 * count {
        return Err(invalid("the number of information requests does not match the option's length"));
    }
    let infos = (0..count).map_while(|_| reader.u16()).collect();
    Ok(ExportQuery { name, infos })
}

fn meta_context_query(data: &[u8]) -> Result<MetaContextQuery, Malformed> {
    let mut reader = Reader(data);
    let name = counted_string(&mut reader)?;
    let count = reader.u32().ok_or(SHORT)?;
    if count > MAX_QUERIES {
        return Err(Malformed { reply: NBD_REP_ERR_TOO_BIG, why: "more than 1024 queries" });
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(counted_string(&mut reader)?);
    }
    if !reader.0.is_empty() {
        return Err(invalid("the option's data goes on after its last query"));
    }
    Ok(MetaContextQuery { name, queries })
}

/// Appends one reply to `option` of type `reply` (`NBD_REP_*`).
pub fn option_reply(out: &mut Vec<u8>, option: u32, reply: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&NBD_OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    // Parts are made here from strings of at most 4096 bytes.
    out.extend_from_slice(&(length as u32).to_be_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// All that an oldstyle server says. Source: NBD proto.md "Oldstyle negotiation".
pub fn oldstyle_greeting(size: u64, flags: u16) -> Vec<u8> {
    let mut data = NBD_MAGIC.to_be_bytes().to_vec();
    data.extend_from_slice(&NBD_OLDSTYLE_MAGIC.to_be_bytes());
    data.extend_from_slice(&size.to_be_bytes());
    // No handshake flags.
    data.extend_from_slice(&[0; 2]);
    data.extend_from_slice(&flags.to_be_bytes());
    data.resize(data.len() + 124, 0);
    data
}

/// `NBD_INFO_EXPORT`
pub fn info_export(size: u64, flags: u16) -> Vec<u8> {
    let mut data = NBD_INFO_EXPORT.to_be_bytes().to_vec();
    data.extend_from_slice(&size.to_be_bytes());
    data.extend_from_slice(&flags.to_be_bytes());
    data
}

/// `NBD_INFO_BLOCK_SIZE`
pub fn info_block_size(size: crate::device::BlockSize) -> Vec<u8> {
    let mut data = NBD_INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for number in [size.minimum, size.preferred, size.maximum] {
        data.extend_from_slice(&number.to_be_bytes());
    }
    data
}

/// The end of a handshake by `NBD_OPT_EXPORT_NAME`, which has no other reply.
pub fn export_name_reply(size: u64, flags: u16, no_zeroes: bool) -> Vec<u8> {
    let mut data = size.to_be_bytes().to_vec();
    data.extend_from_slice(&flags.to_be_bytes());
    if !no_zeroes {
        data.resize(data.len() + 124, 0);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_go() {
        let data = [0, 0, 0, 2, b'a', b'b', 0, 2, 0, 1, 0, 3];
        let query = ExportQuery { name: b"ab".to_vec(), infos: vec![NBD_INFO_NAME, NBD_INFO_BLOCK_SIZE] };
        assert_eq!(HandshakeOption::parse(NBD_OPT_GO, &data), Ok(HandshakeOption::Go(query)));
    }

    #[test]
    fn refuses_what_does_not_add_up() {
        for data in [
            &[][..],
            &[0, 0, 0, 1],
            &[0, 0, 0, 9, b'a', 0, 0],
            &[255, 255, 255, 255, 0, 0],
            &[0, 0, 0, 0, 0, 1],
            &[0, 0, 0, 0, 0, 0, 7],
            &[0, 0, 0, 1, 0, 0, 0],
        ] {
            assert!(HandshakeOption::parse(NBD_OPT_GO, data).is_err(), "{data:?}");
        }
        // A count of queries that no data could hold costs nothing.
        let data = [0, 0, 0, 0, 255, 255, 255, 255];
        assert!(HandshakeOption::parse(NBD_OPT_SET_META_CONTEXT, &data).is_err());
        assert!(HandshakeOption::parse(NBD_OPT_LIST, &[0]).is_err());
        assert!(HandshakeOption::parse(NBD_OPT_EXPORT_NAME, &[b'x'; NBD_MAX_STRING + 1]).is_err());
    }

    #[test]
    fn reads_queries() {
        let mut data = vec![0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 5];
        data.extend_from_slice(b"base:");
        data.extend_from_slice(&[0, 0, 0, 0]);
        let query = MetaContextQuery { name: Vec::new(), queries: vec![b"base:".to_vec(), Vec::new()] };
        let parsed = HandshakeOption::parse(NBD_OPT_LIST_META_CONTEXT, &data);
        assert_eq!(parsed, Ok(HandshakeOption::ListMetaContext(query)));
    }
}
