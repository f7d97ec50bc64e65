//! Debug flags: what `-D NAME.FLAG=N` sets, and where. A plugin or filter declares its own in its own file
//! ([`Plugin::debug_flags`](crate::layer::Plugin::debug_flags)); the server's are here.
//! Source: nbdkit server/debug-flags.c; docs/nbdkit.pod "SERVER DEBUG FLAGS".

use crate::cli::DebugFlag;
use crate::layer::Flag;

/// The name that stands for the server itself.
const SERVER: &str = "nbdkit";

/// The server's own flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerFlags {
    /// Show calls that set a layer up or ask it: open, close, what it can do, flush.
    pub backend_controlpath: i32,
    /// Show calls that move data.
    pub backend_datapath: i32,
    /// Show the environment at the start.
    pub environ: i32,
    /// How much of GnuTLS's own log to show, 0 to 99. Taken, so that nobody is warned of it; there is no GnuTLS here.
    pub tls_log: i32,
    /// Show what was agreed on in a TLS handshake. Taken likewise: it is always shown with `-v`.
    pub tls_session: i32,
}

impl Default for ServerFlags {
    fn default() -> ServerFlags {
        ServerFlags { backend_controlpath: 1, backend_datapath: 1, environ: 0, tls_log: 0, tls_session: 0 }
    }
}

impl ServerFlags {
    fn flags(&mut self) -> Vec<Flag<'_>> {
        vec![
            ("backend.controlpath", &mut self.backend_controlpath),
            ("backend.datapath", &mut self.backend_datapath),
            ("environ", &mut self.environ),
            ("tls.log", &mut self.tls_log),
            ("tls.session", &mut self.tls_session),
        ]
    }
}

/// Sets the flags that `wanted` names, in the layers and in the server. `layers` are names and what they declare. Returns the
/// server's, and a line for each flag that nothing has. Of several settings of one flag the first counts, as in nbdkit.
pub fn apply(wanted: &[DebugFlag], layers: Vec<(&str, Vec<Flag<'_>>)>) -> (ServerFlags, Vec<String>) {
    let mut server = ServerFlags::default();
    let mut known = layers;
    known.push((SERVER, server.flags()));
    let mut warnings = Vec::new();
    for DebugFlag { name, flag, value } in wanted.iter().rev() {
        let mut used = false;
        let mut there_are = Vec::new();
        let mut found = false;
        for (_, flags) in known.iter_mut().filter(|(layer, _)| layer == name) {
            used = true;
            for (known, place) in flags {
                there_are.push(*known);
                if known == flag {
                    **place = *value;
                    found = true;
                }
            }
        }
        if !used {
            warnings.push(format!("warning: debug flag -D {name}.{flag} was not used"));
        } else if !found {
            let symbol = format!("{name}_debug_{flag}").replace('.', "_");
            let hint = if there_are.is_empty() { "it has none".to_owned() } else { there_are.join(", ") };
            warnings.push(format!(
                "warning: -D {name}.{flag}: {name} does not contain a global variable called {symbol} (its flags: {hint})"
            ));
        }
    }
    // Said in the order of the command line.
    warnings.reverse();
    drop(known);
    (server, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag(name: &str, flag: &str, value: i32) -> DebugFlag {
        DebugFlag { name: name.to_owned(), flag: flag.to_owned(), value }
    }

    #[test]
    fn a_flag_reaches_every_layer_of_its_name_and_the_server() {
        let (mut one, mut two, mut other) = (0, 0, 0);
        let layers = vec![
            ("ip", vec![("rules", &mut one)]),
            ("ip", vec![("rules", &mut two)]),
            ("file", vec![("zero", &mut other)]),
        ];
        let wanted = [flag("ip", "rules", 2), flag("nbdkit", "backend.datapath", 0), flag("ip", "rules", 3)];
        let (server, warnings) = apply(&wanted, layers);
        assert_eq!((one, two, other), (2, 2, 0));
        assert_eq!(server, ServerFlags { backend_datapath: 0, ..ServerFlags::default() });
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn what_nothing_has_is_warned_of_in_nbdkits_words() {
        let mut place = 0;
        let layers = vec![("ip", vec![("rules", &mut place)]), ("null", vec![])];
        let wanted = [flag("ip", "a.b", 1), flag("null", "x", 1), flag("file", "zero", 1)];
        assert_eq!(
            apply(&wanted, layers).1,
            [
                "warning: -D ip.a.b: ip does not contain a global variable called ip_debug_a_b (its flags: rules)",
                "warning: -D null.x: null does not contain a global variable called null_debug_x (its flags: it has none)",
                "warning: debug flag -D file.zero was not used",
            ]
        );
    }
}
