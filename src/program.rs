//! Parse, answer or start, exit status.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use nbdcaptive_actors::device::ThreadModel;

use crate::cli::{self, Options, Request};
use crate::config::Layers;
use crate::identity;
use crate::inherited::Inherited;
use crate::layer::About;
use crate::report::{Report, print, to_stderr};
use crate::{captive, daemon, filters, kept, listen, plugins, probe, server};

/// Runs the program with `words`, the first of which is its own name, and returns its exit status. To be called first of all
/// in a process that has no thread yet: it forks.
pub fn run(words: Vec<OsString>) -> i32 {
    identity::take(words.first().map(OsString::as_os_str));
    let inherited = Inherited::take();
    let activated = match listen::activated() {
        Ok(activation) => activation,
        Err(error) => {
            Report::early().say(error);
            return 1;
        }
    };
    let current_directory = std::env::current_dir().ok();
    let parsed = cli::parse(words.into_iter().skip(1), current_directory.as_deref());
    let allowed = parsed.and_then(|(request, options)| {
        if !activated.sockets.is_empty() {
            cli::check_activated(&options)?;
        }
        Ok((request, options))
    });
    let (request, options) = match allowed {
        Ok(parsed) => parsed,
        Err(error) => {
            to_stderr(&error.report(identity::name()));
            return 1;
        }
    };
    if matches!(request, Request::Serve | Request::DumpPlugin)
        && let Err(error) = plugins::sh::read_inline(&options)
    {
        Report::early().error(error);
        return 1;
    }
    if request != Request::Serve {
        return answer(request, &options);
    }
    if options.run.is_some() {
        captive::front::run(&options, &inherited)
    } else if options.foreground || !activated.sockets.is_empty() {
        // Whoever gave us sockets holds on to our pid.
        server::run(&options, server::Role::Alone { inherited: &inherited, daemon: None, activated })
    } else {
        daemon::run(&options, &inherited)
    }
}

/// Answers on stdout what can be answered without serving. Whoever asked must not take half an answer for one.
fn answer(request: Request, options: &Options) -> i32 {
    let mut text = Vec::new();
    match request {
        Request::Serve => {}
        Request::Probe => return probe::run(options),
        Request::DumpConfig => text = cli::dump_config::dump_config(identity::package()),
        Request::ShortOptions => text = cli::short_options().into(),
        Request::Candidates => text = cli::candidates::answer(&options.parameters).into(),
        Request::Completion => text = options.completion.map_or("", cli::completion::Shell::script).into(),
        Request::Man => match cli::man::answer(options) {
            Ok(page) => text = page.into(),
            Err(error) => {
                Report::early().error(error);
                return 1;
            }
        },
        Request::LongOptions => text = cli::long_options(identity::package()).into(),
        Request::Help | Request::Version | Request::DumpPlugin => {
            let mut layers = match options.plugin.as_ref().map(|_| Layers::find(options)).transpose() {
                Ok(layers) => layers,
                Err(error) => {
                    Report::early().error(error);
                    return 1;
                }
            };
            if let Some(layers) = &mut layers {
                let (_, warnings) = layers.set_debug_flags(&options.debug_flags);
                warnings.iter().for_each(|warning| Report::early().warn(warning));
            }
            let about: Vec<_> = layers.iter().flat_map(Layers::about).collect();
            let dumped = match &mut layers {
                Some(layers) if request == Request::DumpPlugin => layers.dump(&options.parameters),
                _ => Ok((ThreadModel::Parallel, Vec::new())),
            };
            kept::end();
            let (model, further) = match dumped {
                Ok(dumped) => dumped,
                Err(error) => {
                    Report::early().error(error);
                    return 1;
                }
            };
            match request {
                Request::Help => {
                    let plugins: Vec<_> = plugins::ALL.iter().map(|entry| entry.about).collect();
                    let filters: Vec<_> = filters::ALL.iter().map(|entry| entry.about).collect();
                    text.extend(cli::help::help(identity::name(), &plugins, &filters).bytes());
                    about.iter().for_each(|(kind, about)| {
                        text.extend(cli::help::layer_help(identity::name(), kind, about).bytes());
                    });
                }
                Request::Version => {
                    text.extend(format!("{}\n", identity::package()).bytes());
                    for (_, about) in about {
                        text.extend(format!("{} {}\n", about.name, identity::package().version).bytes());
                    }
                }
                // The plugin first, whatever stands before it.
                _ => {
                    for (kind, about) in about.iter().rev() {
                        text.extend(dump_plugin(kind, about, model));
                        if *kind == "plugin" {
                            text.extend(&further);
                        }
                    }
                }
            }
        }
    }
    match print(&text) {
        Ok(()) => 0,
        Err(error) => {
            Report::early().error(format_args!("stdout: {error}"));
            1
        }
    }
}

/// `--dump-plugin` of one layer. Its path is this program's: a layer is built in. The keys of a filter bear its name, because
/// those of all layers are in one list. Source: nbdkit server/plugins.c `plugin_dump_fields`, server/filters.c
/// `filter_dump_fields`.
fn dump_plugin(kind: &str, about: &About, model: ThreadModel) -> Vec<u8> {
    let prefix = if kind == "plugin" { String::new() } else { format!("{}_", about.name) };
    let mut text = Vec::new();
    if let Ok(path) = std::env::current_exe() {
        text.extend([prefix.as_bytes(), b"path=", path.as_os_str().as_bytes(), b"\n"].concat());
    }
    let mut line = |key: &str, value: &str| text.extend_from_slice(format!("{key}={value}\n").as_bytes());
    line(&format!("{prefix}name"), about.name);
    if kind == "plugin" {
        line("version", identity::package().version);
        let name = |model| match model {
            ThreadModel::SerializeConnections => "serialize_connections",
            ThreadModel::SerializeAllRequests => "serialize_all_requests",
            ThreadModel::SerializeRequests => "serialize_requests",
            ThreadModel::Parallel => "parallel",
        };
        line("max_thread_model", name(about.thread_model));
        line("thread_model", name(model));
        about.magic_key.iter().for_each(|key| line("magic_config_key", key));
    } else {
        about.dump.iter().for_each(|(key, value)| line(key, value));
    }
    text
}
