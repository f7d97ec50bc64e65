//! `ip`: which clients may connect, by where they come from. Source: nbdkit filters/ip/ip.c, nbdkit-ip-filter.pod.
//!
//! A client is let in if an `allow` rule matches, else refused if a `deny` rule does, else let in. One of whom nothing is known
//! is refused. Rules about TLS certificates (`dn:`, `issuer-dn:`) take a client's word only once its certificate was verified, so
//! with them all rules wait for the handshake.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};
use nbdcaptive_actors::device::{Client, Device, Error, ErrorCode, Export, Exports, Peer, Result, ThreadModel};
use nbdcaptive_actors::filter::{FilterExports, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "ip",
    summary: "let in or refuse clients by their address

        A client for which one of the rules of `allow` holds is let in. Of the others, those for which one of the
        rules of `deny` holds are refused. The rest is let in. So `deny=all` with some `allow` makes a list of those
        who may.

        Rules are `127.0.0.1`, `192.168.0.0/16`, `::1` and the like, `any` (or `all`), `anyipv4`, `anyipv6`,
        `anyunix`, and for clients at a Unix socket `pid:`*N*, `uid:`*N* and `gid:`*N*; for virtual machines
        `anyvsock`, `vsock-cid:`*N* and `vsock-port:`*N*; by the label that a security module such as SELinux has
        given the client, `security:`*LABEL*; and by a client's TLS certificate and the one that signed it,
        `dn:`*PATTERN* and `issuer-dn:`*PATTERN*.

        # Examples

            nbdcaptive --filter=ip memory 1M allow=anyunix deny=all \\
                --run 'nbdinfo \"$uri\"'
            nbdcaptive -f --filter=ip file disk.img allow=127.0.0.1,::1 deny=all
        ",
    parameters: &[
        optional(
            "allow",
            "<RULE>[,<RULE>...]",
            "let these in: an address, ADDRESS/PREFIX, any, anyipv4, anyunix, pid:...",
        ),
        optional("deny", "<RULE>[,<RULE>...]", "refuse these, unless they are let in"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Any,
    AnyIpv4,
    AnyIpv6,
    AnyUnix,
    Ipv4(Ipv4Addr, u32),
    Ipv6(Ipv6Addr, u32),
    Pid(i64),
    Uid(i64),
    Gid(i64),
    /// What a client's certificate says, of whom it is.
    Subject(Pattern),
    /// The same, of who signed it.
    Issuer(Pattern),
    /// The whole of the label that a security module has given the client.
    Label(Vec<u8>),
    AnyVsock,
    VsockCid(i64),
    VsockPort(i64),
}

impl Rule {
    /// Whether it takes the handshake to know.
    fn is_late(&self) -> bool {
        matches!(self, Rule::Subject(_) | Rule::Issuer(_))
    }

    fn matches(&self, client: &Client) -> bool {
        let (peer, names) = (client.peer.as_ref(), client.tls_names.as_ref());
        let ip = match peer {
            Some(Peer::Inet(address)) => Some(address.ip()),
            _ => None,
        };
        let (pid, uid, gid) = match peer {
            Some(Peer::Unix { pid, uid, gid }) => (pid.map(i64::from), uid.map(i64::from), gid.map(i64::from)),
            _ => (None, None, None),
        };
        match self {
            Rule::Any => true,
            Rule::AnyIpv4 => matches!(ip, Some(IpAddr::V4(_))),
            Rule::AnyIpv6 => matches!(ip, Some(IpAddr::V6(_))),
            Rule::AnyUnix => matches!(peer, Some(Peer::Unix { .. })),
            Rule::Ipv4(rule, prefix) => {
                let bits = |address: &Ipv4Addr| address.to_bits().checked_shr(32 - prefix).unwrap_or(0);
                matches!(ip, Some(IpAddr::V4(ip)) if bits(&ip) == bits(rule))
            }
            Rule::Ipv6(rule, prefix) => {
                let bits = |address: &Ipv6Addr| address.to_bits().checked_shr(128 - prefix).unwrap_or(0);
                matches!(ip, Some(IpAddr::V6(ip)) if bits(&ip) == bits(rule))
            }
            Rule::Pid(rule) => pid == Some(*rule),
            Rule::Uid(rule) => uid == Some(*rule),
            Rule::Gid(rule) => gid == Some(*rule),
            // As in nbdkit, one without a certificate has empty names.
            Rule::Subject(pattern) => pattern.matches_with(names.map_or("", |names| &names.subject), ANY_CASE),
            Rule::Issuer(pattern) => pattern.matches_with(names.map_or("", |names| &names.issuer), ANY_CASE),
            Rule::Label(label) => {
                client.peer_label.as_ref() == Some(label) && !matches!(peer, Some(Peer::Vsock { .. }))
            }
            Rule::AnyVsock => matches!(peer, Some(Peer::Vsock { .. })),
            Rule::VsockCid(rule) => matches!(peer, Some(Peer::Vsock { cid, .. }) if i64::from(*cid) == *rule),
            Rule::VsockPort(rule) => matches!(peer, Some(Peer::Vsock { port, .. }) if i64::from(*port) == *rule),
        }
    }
}

/// How names are compared. Source: nbdkit's `FNM_CASEFOLD`.
const ANY_CASE: MatchOptions =
    MatchOptions { case_sensitive: false, require_literal_separator: false, require_literal_leading_dot: false };

/// The text behind a word, in whatever case that is.
fn after<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let (head, tail) = text.split_at_checked(word.len())?;
    head.eq_ignore_ascii_case(word).then_some(tail)
}

/// A number in a range.
fn number(what: &str, text: &str, least: i64, most: i64) -> std::result::Result<i64, ConfigError> {
    let out_of_range = || ConfigError(format!("{what} parameter out of range"));
    if text.trim_start().starts_with('-') {
        return Err(out_of_range());
    }
    let number = values::u64(what, text).map_err(ConfigError)?;
    i64::try_from(number).ok().filter(|number| (least..=most).contains(number)).ok_or_else(out_of_range)
}

fn rule(key: &str, text: &str) -> std::result::Result<Rule, ConfigError> {
    let words: [(&[&str], Rule); 5] = [
        (&["any", "all"], Rule::Any),
        (&["anyipv4", "allipv4"], Rule::AnyIpv4),
        (&["anyipv6", "allipv6"], Rule::AnyIpv6),
        (&["anyunix", "allunix"], Rule::AnyUnix),
        (&["anyvsock", "allvsock"], Rule::AnyVsock),
    ];
    for (names, rule) in words {
        if names.iter().any(|name| text.eq_ignore_ascii_case(name)) {
            return Ok(rule);
        }
    }
    if let Some(text) = after(text, "pid:") {
        return number("pid:", text, 1, i64::MAX).map(Rule::Pid);
    }
    if let Some(text) = after(text, "uid:") {
        return number("uid:", text, 0, i64::MAX).map(Rule::Uid);
    }
    if let Some(text) = after(text, "gid:") {
        return number("gid:", text, 0, i64::MAX).map(Rule::Gid);
    }
    if let Some(text) = after(text, "vsock-cid:") {
        return number("vsock-cid:", text, 0, u32::MAX.into()).map(Rule::VsockCid);
    }
    if let Some(text) = after(text, "vsock-port:") {
        return number("vsock-port:", text, 0, u32::MAX.into()).map(Rule::VsockPort);
    }
    let pattern = |name: &str| Pattern::new(name).map_err(|error| ConfigError(format!("{key}={text}: {error}")));
    if let Some(name) = after(text, "dn:") {
        return pattern(name).map(Rule::Subject);
    }
    if let Some(name) = after(text, "issuer-dn:") {
        return pattern(name).map(Rule::Issuer);
    }
    if let Some(label) = after(text, "security:") {
        return Ok(Rule::Label(label.into()));
    }
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(values::unsigned(key, prefix).map_err(ConfigError)?)),
        None => (text, None),
    };
    let (most, rule): (_, fn(IpAddr, u32) -> Rule) = match address.parse() {
        Ok(IpAddr::V4(_)) => (32, address_rule),
        Ok(IpAddr::V6(_)) => (128, address_rule),
        Err(_) if prefix.is_some() => {
            return Err(ConfigError(format!("cannot parse address \"{address}\" from {key}={text}")));
        }
        Err(_) => return Err(ConfigError(format!("don't know how to parse rule: {key}={text}"))),
    };
    let prefix = prefix.unwrap_or(most);
    if prefix > most {
        return Err(ConfigError(format!("prefix is > {most} in {key}={text}")));
    }
    // It has just been parsed.
    address.parse().map(|address| rule(address, prefix)).map_err(|_| ConfigError(format!("{key}={text}")))
}

fn address_rule(address: IpAddr, prefix: u32) -> Rule {
    match address {
        IpAddr::V4(address) => Rule::Ipv4(address, prefix),
        IpAddr::V6(address) => Rule::Ipv6(address, prefix),
    }
}

/// The filter.
#[derive(Debug, Default)]
pub struct Ip {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    /// `-D ip.rules=1`: says which rules are tried for each client.
    debug_rules: i32,
}

impl Filter for Ip {
    fn debug_flags(&mut self) -> Vec<Flag<'_>> {
        vec![("rules", &mut self.debug_rules)]
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        let text = value.text(key)?;
        let rules = match key {
            "allow" => &mut self.allow,
            "deny" => &mut self.deny,
            _ => return Err(unknown(key)),
        };
        // Names in certificates have commas.
        if after(text, "dn:").or_else(|| after(text, "issuer-dn:")).is_some() {
            rules.push(rule(key, text)?);
            return Ok(());
        }
        // One comma at the end is fine.
        let list = text.strip_suffix(',').unwrap_or(text);
        for one in list.split(',').filter(|_| !text.is_empty()) {
            if one.is_empty() {
                return Err(ConfigError(format!("{key}: empty entry in rule list")));
            }
            rules.push(rule(key, one)?);
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        let late = self.allow.iter().chain(&self.deny).any(Rule::is_late);
        Ok(Arc::new(FilteredExports(Guarded { next, rules: *self, late })))
    }
}

struct Guarded {
    next: Arc<dyn Exports>,
    rules: Ip,
    /// A rule is about TLS, so nothing can be said before the handshake.
    late: bool,
}

impl Guarded {
    fn check(&self, client: &Client) -> Result<()> {
        let Client { peer, peer_label, tls_names, .. } = client;
        if self.rules.debug_rules != 0 {
            let label = peer_label.as_ref().map(|label| label.escape_ascii().to_string());
            client.connection.debug(format_args!("ip: peer: {peer:?}, label: {label:?}, certificate: {tls_names:?}"));
        }
        let matches = |which: &str, rules: &[Rule]| {
            rules.iter().any(|rule| {
                let matches = rule.matches(client);
                if self.rules.debug_rules != 0 {
                    let answer = if matches { "yes" } else { "no" };
                    client.connection.debug(format_args!("ip: match client with {which}: {rule:?} => {answer}"));
                }
                matches
            })
        };
        if peer.is_some() && (matches("allow", &self.rules.allow) || !matches("deny", &self.rules.deny)) {
            return Ok(());
        }
        let why = "client not permitted to connect because of source address restriction";
        Err(Error::failed(ErrorCode::NotPermitted, why))
    }

    fn check_if(&self, late: bool, client: &Client) -> Result<()> {
        if late == self.late { self.check(client) } else { Ok(()) }
    }
}

impl FilterExports for Guarded {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn looks_at_clients(&self) -> bool {
        true
    }

    fn preconnect(&self, client: &Client) -> Result<()> {
        self.check_if(false, client)?;
        if self.next.looks_at_clients() { self.next.preconnect(client) } else { Ok(()) }
    }

    fn list(&self, client: &Client) -> Result<Vec<Export>> {
        self.check_if(true, client)?;
        self.next.list(client)
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        self.check_if(true, client)?;
        self.next.open(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over, refused};
    use nbdcaptive_actors::device::Names;
    use std::net::SocketAddr;

    fn inet(address: &str) -> Option<Peer> {
        Some(Peer::Inet(SocketAddr::new(address.parse().unwrap(), 1000)))
    }

    const UNIX: Option<Peer> = Some(Peer::Unix { pid: Some(10), uid: Some(20), gid: Some(30) });

    const VSOCK: Option<Peer> = Some(Peer::Vsock { cid: 3, port: 1024 });

    /// Whether a client is let in by these parameters.
    fn enters(parameters: &[(&str, &str)], peer: Option<Peer>) -> bool {
        let exports = over(memory("1M"), "ip", parameters).unwrap();
        exports.preconnect(&Client { peer, ..Client::default() }).is_ok()
    }

    #[test]
    fn allow_goes_before_deny() {
        assert!(enters(&[], inet("1.2.3.4")));
        assert!(!enters(&[("deny", "all")], inet("1.2.3.4")));
        assert!(enters(&[("deny", "all"), ("allow", "1.2.3.4")], inet("1.2.3.4")));
        assert!(!enters(&[("allow", "1.2.3.4"), ("deny", "all")], inet("1.2.3.5")));
        assert!(enters(&[("allow", "1.2.3.4")], inet("1.2.3.5")), "what no rule says anything of is let in");
        assert!(!enters(&[], None), "one of whom nothing is known is not");
        assert!(enters(&[("allow", "9.9.9.9,10.0.0.0/8,"), ("allow", "anyunix"), ("deny", "ANY")], inet("10.1.2.3")));
    }

    #[test]
    fn each_rule_matches_its_own() {
        let only = |rule: &str, peer| enters(&[("allow", rule), ("deny", "any")], peer);
        for (rule, yes, no) in [
            ("anyipv4", inet("1.2.3.4"), inet("::1")),
            ("AllIPv6", inet("::1"), inet("1.2.3.4")),
            ("anyunix", UNIX, inet("1.2.3.4")),
            ("192.168.0.0/23", inet("192.168.1.255"), inet("192.168.2.0")),
            ("0.0.0.0/0", inet("255.255.255.255"), inet("::1")),
            ("fd00::/8", inet("fdff::1"), inet("fe00::1")),
            ("::/0", inet("ffff::"), UNIX),
            ("::1", inet("::1"), inet("::2")),
            ("2001:db8::8000/113", inet("2001:db8::ffff"), inet("2001:db8::7fff")),
            ("pid:10", UNIX, inet("1.2.3.4")),
            ("UID:20", UNIX, Some(Peer::Unix { pid: None, uid: Some(10), gid: None })),
            ("gid:30", UNIX, Some(Peer::Unix { pid: None, uid: Some(30), gid: Some(20) })),
            ("anyvsock", VSOCK, UNIX),
            ("AllVsock", VSOCK, inet("1.2.3.4")),
            ("vsock-cid:3", VSOCK, Some(Peer::Vsock { cid: 4, port: 3 })),
            ("vsock-port:0x400", VSOCK, Some(Peer::Vsock { cid: 1024, port: 3 })),
        ] {
            assert!(only(rule, yes), "{rule}");
            assert!(!only(rule, no), "{rule}");
        }
    }

    #[test]
    fn a_label_is_compared_as_a_whole() {
        let enters = |key, label: Option<&str>, peer| {
            let rules = [(key, "Security:system_u:system_r:svirt_t:s0"), ("deny", "anyipv4")];
            let exports = over(memory("1M"), "ip", &rules).unwrap();
            let peer_label = label.map(|label| label.as_bytes().to_vec());
            exports.preconnect(&Client { peer, peer_label, ..Client::default() }).is_ok()
        };
        assert!(enters("allow", Some("system_u:system_r:svirt_t:s0"), inet("1.2.3.4")));
        for other in [None, Some(""), Some("system_u:system_r:svirt_t"), Some("SYSTEM_U:system_r:svirt_t:s0")] {
            assert!(!enters("allow", other, inet("1.2.3.4")), "{other:?}");
            assert!(enters("deny", other, UNIX), "{other:?}");
        }
        assert!(!enters("deny", Some("system_u:system_r:svirt_t:s0"), UNIX));
        assert!(
            enters("deny", Some("system_u:system_r:svirt_t:s0"), VSOCK),
            "such a label is not of the virtual machine"
        );
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        let why = |rule| refused("ip", &[("allow", rule)]);
        assert_eq!(why("x"), "don't know how to parse rule: allow=x");
        assert_eq!(why("1.2.3"), "don't know how to parse rule: allow=1.2.3");
        assert_eq!(why("x/8"), "cannot parse address \"x\" from allow=x/8");
        assert_eq!(why("1.2.3.4/33"), "prefix is > 32 in allow=1.2.3.4/33");
        assert_eq!(why("::/129"), "prefix is > 128 in allow=::/129");
        assert_eq!(why("any,,any"), "allow: empty entry in rule list");
        assert_eq!(why(","), "allow: empty entry in rule list");
        assert_eq!(why("pid:0"), "pid: parameter out of range");
        assert_eq!(why("uid:-1"), "uid: parameter out of range");
        assert_eq!(why("vsock-cid:4294967296"), "vsock-cid: parameter out of range");
        assert!(why("dn:[").starts_with("allow=dn:[: "));
    }

    #[test]
    fn names_in_certificates_are_looked_at_when_they_are_known() {
        let exports = |parameters: &[(&str, &str)]| over(memory("1M"), "ip", parameters).unwrap();
        let client = |subject: &str, issuer: &str| {
            let names = Names { subject: subject.to_owned(), issuer: issuer.to_owned() };
            Client { peer: inet("1.2.3.4"), is_tls: true, tls_names: Some(names), ..Client::default() }
        };
        let nobody = || Client { peer: inet("1.2.3.4"), ..Client::default() };
        let (alice, bob) = (client("CN=alice,O=BigCo,C=US", "CN=CA"), client("CN=bob,O=Other", "CN=Other CA"));

        let allowed = exports(&[("allow", "dn:*,o=bigco,*"), ("allow", "DN:CN=b?b,O=X"), ("deny", "all")]);
        assert!(allowed.preconnect(&nobody()).is_ok(), "nothing is known yet");
        assert!(allowed.open(&alice).is_ok() && allowed.list(&alice).is_ok());
        assert!(allowed.open(&bob).is_err() && allowed.list(&bob).is_err() && allowed.open(&nobody()).is_err());

        let denied = exports(&[("deny", "issuer-dn:CN=Other*")]);
        assert!(denied.preconnect(&bob).is_ok() && denied.open(&bob).is_err());
        assert!(denied.open(&alice).is_ok() && denied.open(&nobody()).is_ok());
        // All rules wait, and so does one about an address.
        let mixed = exports(&[("allow", "dn:nobody"), ("deny", "1.2.3.4")]);
        assert!(mixed.preconnect(&alice).is_ok() && mixed.open(&alice).is_err());
    }
}
