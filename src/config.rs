//! Words become a stack of plugin and filters. Files may be opened here; nothing is created, and nothing listens yet.
//! Source: nbdkit server/main.c; docs/nbdkit.pod "PLUGIN CONFIGURATION".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use async_channel::Receiver;
use nbdcaptive_actors::device::{Exports, ThreadModel};

use crate::cli::DebugFlag;
use crate::cli::{Options, Parameter, closest, split_parameter};
use crate::debug::{self, ServerFlags};
use crate::layer::{About, ConfigError, Filter, Flag, Lifetime, Plugin, Server, Step, Value};
use crate::trace::Trace;
use crate::{filters, plugins};

/// Layers that are configured.
pub struct Stack {
    /// What serves: the outermost layer.
    pub exports: Arc<dyn Exports>,
    /// What filters said of the server's end.
    pub lifetime: Lifetime,
    /// The plugin's name.
    pub plugin: &'static str,
    /// What is to be done when the server listens, in this order.
    pub after_fork: Vec<Step>,
    /// A message asks for the end.
    pub asked: Receiver<()>,
}

/// The layers that a command line names, not configured.
pub struct Layers {
    plugin: (&'static About, Box<dyn Plugin>),
    /// The one next to the client first.
    filters: Vec<(&'static About, Box<dyn Filter>)>,
    /// What of each layer is shown.
    trace: Trace,
}

impl Layers {
    /// Finds plugin and filters. Errors: a name that nothing has, as a line.
    pub fn find(options: &Options) -> Result<Layers, ConfigError> {
        let name = options.plugin.as_deref().unwrap_or_default();
        let entry = known("plugin", name, plugins::ALL.iter().map(|entry| entry.about.name), plugins::find)?;
        let filters = options
            .filters
            .iter()
            .map(|name| {
                let names = filters::ALL.iter().map(|entry| entry.about.name);
                let entry = known("filter", name, names, filters::find)?;
                Ok((entry.about, (entry.new)()))
            })
            .collect::<Result<_, ConfigError>>()?;
        Ok(Layers { plugin: (entry.about, (entry.new)()), filters, trace: Trace::default() })
    }

    /// Sets debug flags. Returns the server's own, and a line for each that nothing has.
    pub fn set_debug_flags(&mut self, wanted: &[DebugFlag]) -> (ServerFlags, Vec<String>) {
        let plugin: (_, Vec<Flag<'_>>) = (self.plugin.0.name, self.plugin.1.debug_flags());
        let filters = self.filters.iter_mut().map(|(about, filter)| (about.name, filter.debug_flags()));
        debug::apply(wanted, filters.chain([plugin]).collect())
    }

    /// Shows what is asked of each layer to who looks with `-v`.
    pub fn trace(&mut self, trace: Trace) {
        self.trace = trace;
    }

    /// What the layers say of themselves, from the client inwards.
    pub fn about(&self) -> impl Iterator<Item = (&'static str, &'static About)> {
        self.filters.iter().map(|(about, _)| ("filter", *about)).chain([("plugin", self.plugin.0)])
    }

    /// What `--dump-plugin` shows of the layers with these parameters, beside what they say of themselves: how many requests all
    /// of them together take at a time, and lines of the plugin's.
    pub fn dump(&mut self, parameters: &[OsString]) -> Result<(ThreadModel, Vec<u8>), ConfigError> {
        self.plugin.1.meet(&Server::new(None).0);
        self.give_all(parameters)?;
        let (model, own) = self.plugin.1.dump()?;
        let mut lines = Vec::new();
        for callback in self.plugin.1.callbacks().split_whitespace() {
            lines.extend([b"has_", callback.as_bytes(), b"=1\n"].concat());
        }
        self.plugin.0.dump.iter().for_each(|(key, value)| lines.extend(format!("{key}={value}\n").into_bytes()));
        lines.extend(own);
        let filters = self.filters.iter().map(|(about, filter)| filter.thread_model().unwrap_or(about.thread_model));
        let strictest = filters.fold(model.unwrap_or(self.plugin.0.thread_model), ThreadModel::min);
        Ok((strictest, lines))
    }

    /// Gives each parameter to the first layer that knows it.
    fn give_all(&mut self, parameters: &[OsString]) -> Result<(), ConfigError> {
        for (index, word) in parameters.iter().enumerate() {
            match split_parameter(word) {
                Parameter::KeyValue(key, value) => self.give(&key, &value)?,
                Parameter::Bare(value) => match self.plugin.0.magic_key {
                    Some(key) => self.give(key, &value)?,
                    // Scripts are named so by default.
                    None if index == 0 => self.give("script", &value)?,
                    None => {
                        let value = value.to_string_lossy();
                        return Err(ConfigError(format!("expecting key=value on the command line but got: {value}")));
                    }
                },
            }
        }
        Ok(())
    }

    /// Gives each parameter to the first layer that knows it, and completes all, the plugin first.
    pub fn configure(mut self, parameters: &[OsString]) -> Result<Stack, ConfigError> {
        let (server, asked) = Server::new(self.trace.report());
        self.plugin.1.meet(&server);
        self.give_all(parameters)?;
        self.trace.configures(self.plugin.0.name, format_args!("config_complete"));
        self.plugin.1.config_complete()?;
        for (about, filter) in self.filters.iter_mut().rev() {
            self.trace.configures(about.name, format_args!("config_complete"));
            filter.config_complete()?;
        }
        let mut lifetime = Lifetime::default();
        let mut after_fork: Vec<Step> = self.plugin.1.after_fork().into_iter().collect();
        let trace = &self.trace;
        let name = self.plugin.0.name;
        trace.configures(name, format_args!("get_ready"));
        let mut exports = trace.over(name, self.plugin.1.ready()?);
        for (about, filter) in self.filters.into_iter().rev() {
            trace.configures(about.name, format_args!("get_ready"));
            exports = trace.over(about.name, filter.ready(exports, &mut lifetime)?);
        }
        after_fork.append(&mut lifetime.after_fork);
        Ok(Stack { exports, lifetime, plugin: self.plugin.0.name, after_fork, asked })
    }

    fn give(&mut self, key: &str, value: &OsStr) -> Result<(), ConfigError> {
        let takes = |about: &About| about.parameters.iter().any(|parameter| parameter.key == key);
        let step = |about: &About| {
            self.trace.configures(about.name, format_args!("config key={key}, value={}", value.to_string_lossy()));
        };
        let value = Value(value);
        for (about, filter) in &mut self.filters {
            if takes(about) {
                step(about);
                return filter.config(key, value);
            }
        }
        if takes(self.plugin.0) || self.plugin.1.takes_other_keys() {
            step(self.plugin.0);
            return self.plugin.1.config(key, value);
        }
        if self.plugin.0.parameters.is_empty() {
            let name = self.plugin.0.name;
            return Err(ConfigError(format!("{name}: this plugin does not need command line configuration")));
        }
        let taken: Vec<_> =
            self.about().flat_map(|(_, about)| about.parameters.iter().map(|parameter| parameter.key)).collect();
        let hint = match closest(key, taken.iter().copied()) {
            Some(near) => format!(", did you mean '{near}'?"),
            None => format!(", known are: {}", taken.join(", ")),
        };
        Err(ConfigError(format!("unknown parameter '{key}'{hint}")))
    }
}

/// The layer that `word` names: its short name, or the path that nbdkit would have it at, of which the file's name counts. All
/// is built in, so a path to one of nbdkit's own means ours, whether there is such a file or not: scripts make them of
/// `plugindir`, and `built-in` is what `--dump-config` says of that.
fn built_in_name<'a>(kind: &str, word: &'a str) -> Option<&'a str> {
    let file = word.rsplit('/').next().unwrap_or(word);
    let inside = |file: &'a str| {
        let name = file.strip_suffix(".so").unwrap_or(file).strip_prefix("nbdkit-")?;
        name.strip_suffix(kind)?.strip_suffix('-')
    };
    inside(file).or(if is_path(word) { None } else { Some(word) })
}

/// Whether nbdkit would look for a layer here, and not among its own. Source: nbdkit server/options.h `is_short_name`.
fn is_path(word: &str) -> bool {
    word.contains(['/', '.'])
}

/// Whether a package may be named after a layer of this name. Source: nbdkit server/main.c `is_possible_package_name`.
fn is_package_name(word: &[u8]) -> bool {
    word.first().is_some_and(u8::is_ascii_alphabetic)
        && word.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte))
}

fn known<T>(
    kind: &str,
    word: &OsStr,
    names: impl Iterator<Item = &'static str>,
    find: impl Fn(&str) -> Option<T>,
) -> Result<T, ConfigError> {
    let name = word.to_str().and_then(|word| built_in_name(kind, word));
    name.and_then(find).ok_or_else(|| {
        let names: Vec<_> = names.collect();
        let shown = word.as_bytes().escape_ascii();
        let near = name.and_then(|name| closest(name, names.iter().copied()));
        let hint = match near {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!("there are: {}", names.join(", ")),
        };
        // As nbdkit says it, for those who know one of nbdkit's from another machine.
        let package = match near {
            None if is_package_name(word.as_bytes()) => {
                format!("; nbdkit itself may have it, in a package nbdkit-{shown}-{kind} (Fedora) or nbdkit-{kind}-{shown} (Debian), see nbdkit(1)")
            }
            _ => String::new(),
        };
        let why = match word.to_str() {
            Some(word) if is_path(word) && kind == "plugin" && !word.ends_with(".so") => {
                format!("{kind}s are built in and not loaded from files; to serve a script use 'sh {shown}'")
            }
            Some(word) if is_path(word) => format!("{kind}s are built in and not loaded from files, {hint}"),
            // By the name of the file that nbdkit would have looked for.
            _ => format!("nbdkit-{shown}-{kind}: no such {kind}, {hint}{package}"),
        };
        ConfigError(format!("cannot open {kind} \"{shown}\": {why}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_goes_by_its_short_name_or_by_its_file() {
        for (word, name) in [
            ("memory", Some("memory")),
            ("/usr/lib64/nbdkit/plugins/nbdkit-sparse-random-plugin.so", Some("sparse-random")),
            ("built-in/nbdkit-memory-plugin.so", Some("memory")),
            ("./nbdkit-memory-plugin", Some("memory")),
            ("nbdkit-memory-plugin.so", Some("memory")),
            ("nbdkit-cow-filter.so", None),
            ("./memory", None),
            ("memory.so", None),
            ("/", None),
            ("nbdkit--plugin.so", Some("")),
        ] {
            assert_eq!(built_in_name("plugin", word), name, "{word}");
        }
    }

    #[test]
    fn a_layer_that_is_not_there_is_answered_with_what_would_be() {
        let refused = |plugin: &str, filter: Option<&str>| {
            let filters = filter.into_iter().map(OsString::from).collect();
            let options = Options { plugin: Some(plugin.into()), filters, ..Options::default() };
            Layers::find(&options).err().map(|error| error.0).unwrap_or_default()
        };
        assert_eq!(
            refused("memroy", None),
            "cannot open plugin \"memroy\": nbdkit-memroy-plugin: no such plugin, did you mean 'memory'?"
        );
        assert!(
            refused("bad\r", None)
                .starts_with("cannot open plugin \"bad\\r\": nbdkit-bad\\r-plugin: no such plugin, there are: data, ")
        );
        assert!(refused("vddk", None).ends_with(
            "; nbdkit itself may have it, in a package nbdkit-vddk-plugin (Fedora) or nbdkit-plugin-vddk (Debian), see nbdkit(1)"
        ));
        assert!(refused("./nbdkit-foo-plugin.so", None).starts_with(
            "cannot open plugin \"./nbdkit-foo-plugin.so\": plugins are built in and not loaded from files, there are: "
        ));
        assert_eq!(
            refused("./disk.sh", None),
            "cannot open plugin \"./disk.sh\": plugins are built in and not loaded from files; to serve a script use 'sh ./disk.sh'"
        );
        assert!(refused("null", Some("/x/nbdkit-cwo-filter.so")).contains("from files, did you mean 'cow'?"));
        assert_eq!(refused("/x/nbdkit-null-plugin.so", Some("/x/nbdkit-cow-filter.so")), "");
    }

    /// What a parameter makes of whatever it is given is a value or an error.
    #[test]
    fn no_value_of_any_parameter_is_a_panic() {
        let long = "9".repeat(5000);
        let texts: [&[u8]; 26] = [
            b"",
            b"0",
            b"1",
            b"-1",
            b"-",
            b"18446744073709551616",
            b"9223372036854775807",
            b"1e999",
            b"nan",
            b"1:0",
            b"0:1",
            b"%",
            b"0x",
            b",",
            b",,",
            b"=",
            b"~",
            b"~-",
            b"(",
            b"@",
            b"<",
            b"\xff\xfe",
            b"a\nb",
            b"\xc3",
            b"/dev/null/x",
            long.as_bytes(),
        ];
        let names = |names: Vec<&'static str>| names.into_iter().map(OsString::from);
        let plugins = names(plugins::ALL.iter().map(|entry| entry.about.name).collect());
        let filters = names(filters::ALL.iter().map(|entry| entry.about.name).collect());
        let plugins = plugins.map(|plugin| Options { plugin: Some(plugin), ..Options::default() });
        let null = || Options { plugin: Some("null".into()), ..Options::default() };
        let filters = filters.map(|filter| Options { filters: vec![filter], ..null() });
        for options in plugins.chain(filters) {
            let find = || Layers::find(&options).unwrap_or_else(|error| panic!("{error}"));
            let about = find().about().next().map(|(_, about)| about).expect("a layer");
            for parameter in about.parameters {
                for text in texts {
                    let mut layers = find();
                    layers.plugin.1.meet(&Server::new(None).0);
                    let word = [parameter.key.as_bytes(), b"=", text].concat();
                    let word = OsStr::from_bytes(&word).to_owned();
                    // An error may say anything, but on one line.
                    let given = layers.give_all(&[word]);
                    let complete = given.and_then(|()| match layers.filters.first_mut() {
                        Some((_, filter)) => filter.config_complete(),
                        None => layers.plugin.1.config_complete(),
                    });
                    let _ = complete.map_err(|error| error.to_string());
                }
            }
        }
        crate::kept::end();
    }
}
