//! `eval`: a plugin whose methods are shell scripts on the command line, `METHOD=SCRIPT`. As `sh` otherwise, but it knows
//! which methods are there, so that `can_write` and the like follow from `pwrite` and the like.
//! Source: nbdkit plugins/eval/eval.c, plugins/eval/nbdkit-eval-plugin.pod.

use std::path::PathBuf;
use std::sync::Arc;

use nbdcaptive_actors::device::{Exports, ThreadModel};

use super::sh::script::{self, Scripts, Source};
use crate::layer::{About, ConfigError, Parameter, Plugin, Server, Step, Value};

const fn method(key: &'static str, help: &'static str) -> Parameter {
    Parameter { key, value: "<SCRIPT>", help, required: false }
}

/// See the module.
pub static ABOUT: About = About {
    name: "eval",
    summary: "shell scripts on the command line are the plugin

        Each parameter is a method and the shell script that is run for it, as the methods of
        nbdcaptive-sh-plugin(1) are. A script gets the name of the method as `$1` and its arguments behind it,
        writes its answer to stdout, and fails with a line on stderr such as `ENOSPC no room left`. A directory
        `$tmpdir` is there for the scripts, and removed at the end.

        Exit statuses: 0 is success, 1 an error, 2 says that the method is not there, 3 is a plain no.

        # Examples

        A disk of 64 MiB of zeroes:

            nbdcaptive eval get_size='echo 64M' \\
                pread='dd if=/dev/zero count=$3 iflag=count_bytes' \\
                --run 'nbdinfo --size \"$uri\"'

        A file, served by a script:

            nbdcaptive eval get_size='stat -c %s disk.img' \\
                pread='tail -c +$(($4 + 1)) disk.img | head -c $3' \\
                --run 'nbdcopy \"$uri\" out.img'
        ",
    parameters: &[
        method("after_fork", "runs when the server listens"),
        method("block_size", "prints minimum, preferred and maximum block size"),
        method("cache", "brings a range near"),
        method("can_cache", "prints none, emulate or native"),
        method("can_extents", "exits with 0 (yes) or 3 (no)"),
        method("can_fast_zero", "exits with 0 (yes) or 3 (no)"),
        method("can_flush", "exits with 0 (yes) or 3 (no)"),
        method("can_fua", "prints none, emulate or native"),
        method("can_multi_conn", "exits with 0 (yes) or 3 (no)"),
        method("can_trim", "exits with 0 (yes) or 3 (no)"),
        method("can_write", "exits with 0 (yes) or 3 (no)"),
        method("can_zero", "exits with 0 (yes) or 3 (no)"),
        method("close", "runs when a client has left"),
        method("config", "takes parameters that are not in this list, as $2 and $3"),
        method("config_complete", "runs after the last parameter"),
        method("default_export", "prints the name for the empty export name"),
        method("dump_plugin", "prints lines for --dump-plugin"),
        method("export_description", "prints a sentence about the export"),
        method("extents", "prints lines of offset, length and kind (hole,zero)"),
        method("flush", "puts everything on stable storage"),
        method("get_ready", "runs before the server listens"),
        Parameter { key: "get_size", value: "<SCRIPT>", help: "prints the size of the disk", required: true },
        method("is_rotational", "exits with 0 (yes) or 3 (no)"),
        method("list_exports", "prints the names of exports"),
        method("missing", "runs in place of a method that is not given; exits with 2 by default"),
        method("open", "prints the handle, which is $2 of later calls"),
        method("pread", "prints $3 bytes from offset $4"),
        method("preconnect", "runs for each client that connects"),
        method("pwrite", "writes $3 bytes of stdin at offset $4"),
        method("thread_model", "prints how many calls there may be at a time"),
        method("trim", "gives up $3 bytes at offset $4"),
        method("unload", "runs at the end"),
        method("zero", "zeroes $3 bytes at offset $4"),
    ],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// What follows from a method that is there: the name of another, and the script that it then is.
const IMPLIED: [(&str, &str, &[u8]); 6] = [
    ("pwrite", "can_write", b"exit 0\n"),
    ("flush", "can_flush", b"exit 0\n"),
    ("trim", "can_trim", b"exit 0\n"),
    ("zero", "can_zero", b"exit 0\n"),
    ("extents", "can_extents", b"exit 0\n"),
    ("cache", "can_cache", b"echo native\n"),
];

/// The plugin.
#[derive(Debug, Default)]
pub struct Eval {
    server: Option<Server>,
    loaded: Option<(PathBuf, Scripts)>,
    /// When the configuration is complete.
    scripts: Option<Arc<Scripts>>,
}

impl Eval {
    /// With the first call a directory is made, and `missing` in it.
    fn loaded(&mut self) -> Result<&mut (PathBuf, Scripts), ConfigError> {
        if self.loaded.is_none() {
            let directory = script::directory()?;
            // The user may give one of that name.
            let missing = write(&directory, "missing-method", b"exit 2\n")?;
            let source = Source::Each { methods: Default::default(), missing };
            let scripts = Scripts::new(source, &directory, self.server.clone());
            self.loaded = Some((directory, scripts));
        }
        // It was just made.
        self.loaded.as_mut().ok_or_else(|| ConfigError("eval: configured twice".to_owned()))
    }

    fn add(&mut self, name: &'static str, text: &[u8]) -> Result<(), ConfigError> {
        let (directory, scripts) = self.loaded()?;
        let Source::Each { methods, missing } = &mut scripts.source else { return Ok(()) };
        if methods.contains_key(name) {
            return Err(ConfigError(format!("method {name} defined more than once on the command line")));
        }
        let end: &[u8] = if text.is_empty() || text.ends_with(b"\n") { b"" } else { b"\n" };
        let path = write(directory, name, &[text, end].concat())?;
        if name == "missing" {
            *missing = path.clone();
        }
        methods.insert(name, path);
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.loaded.as_ref().is_some_and(|(_, scripts)| match &scripts.source {
            Source::Each { methods, .. } => methods.contains_key(name),
            Source::One(_) => false,
        })
    }
}

fn write(directory: &std::path::Path, name: &str, text: &[u8]) -> Result<std::ffi::CString, ConfigError> {
    let path = script::write_script(directory, name, text)
        .map_err(|error| ConfigError(format!("{}: {error}", directory.join(name).display())))?;
    script::c_path(&path)
}

impl Plugin for Eval {
    fn callbacks(&self) -> &'static str {
        "load unload dump_plugin config config_complete config_help thread_model get_ready after_fork \
         preconnect list_exports default_export open close export_description get_size block_size \
         can_write can_flush is_rotational can_trim can_zero can_fast_zero can_extents can_fua \
         can_multi_conn can_cache pread pwrite flush trim zero extents cache"
    }

    fn meet(&mut self, server: &Server) {
        self.server = Some(server.clone());
    }

    fn takes_other_keys(&self) -> bool {
        true
    }

    fn config(&mut self, key: &str, value: Value<'_>) -> Result<(), ConfigError> {
        if let Some(known) = ABOUT.parameters.iter().find(|parameter| parameter.key == key) {
            return self.add(known.key, value.bytes());
        }
        let (_, scripts) = self.loaded()?;
        match scripts.starting("config", &[key.as_bytes(), value.bytes()])? {
            true => Ok(()),
            false => Err(ConfigError(format!(
                "eval: callback '{key}' is unknown, and there is no 'config' callback to handle it"
            ))),
        }
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        if !self.has("get_size") {
            return Err(ConfigError("'get_size' method is required".to_owned()));
        }
        for (method, can, text) in IMPLIED {
            if self.has(method) && !self.has(can) {
                self.add(can, text)?;
            }
        }
        self.loaded()?.1.starting("config_complete", &[])?;
        self.scripts = self.loaded.take().map(|(_, scripts)| Arc::new(scripts));
        Ok(())
    }

    fn dump(&mut self) -> Result<(Option<ThreadModel>, Vec<u8>), ConfigError> {
        let (_, scripts) = self.loaded()?;
        Ok((Some(scripts.thread_model()?), scripts.dump()?))
    }

    fn after_fork(&mut self) -> Option<Step> {
        let scripts = self.scripts.clone()?;
        Some(Box::new(move || scripts.starting("after_fork", &[]).map(drop)))
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        self.scripts.ok_or_else(|| ConfigError("'get_size' method is required".to_owned()))?.exports()
    }
}
