//! `sh`: an executable file is the plugin. It is run once for every call, with the method's name and arguments as words.
//!
//! | file | what lives in it |
//! |---|---|
//! | `sh.rs` | the parameters of `sh` |
//! | `sh/script.rs` | methods as scripts, for `sh` and `eval` |
//!
//! Source: nbdkit plugins/sh/sh.c, plugins/sh/nbdkit-sh-plugin.pod.

pub mod script;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use nbdcaptive_actors::device::{Exports, ThreadModel};

use crate::cli::{Options, Parameter as Word, split_parameter};
use crate::kept;
use crate::layer::{About, ConfigError, Parameter, Plugin, Server, Step, Value};
use script::{Scripts, Source};

/// See the module.
pub static ABOUT: About = About {
    name: "sh",
    summary: "an executable file, a shell script say, is the plugin

        The file is run for each thing that the server wants to know or have done: `SCRIPT open false default
        false`, `SCRIPT pread 512 0` and so on. The first word is the method, what follows are its arguments; of
        most methods the first argument is what `open` printed. It answers on stdout, takes the data of `pwrite` on
        stdin, and fails with a line such as `EIO no such block` on stderr.

        Exit statuses: 0 is success, 1 an error, 2 says that the method is not there, 3 is a plain no. 4 is success
        and 5 an error after which the server ends; 6 disconnects the client at once, 7 and 8 do so after a success
        or an error. At least `get_size` and `pread` have to be there. A directory `$tmpdir` is there for the
        script, and removed at the end.

        Methods are those that nbdcaptive-eval-plugin(1) lists. Parameters other than `script` are given to the
        method `config`.

        # Examples

        With a file `disk.sh`:

            case $1 in
                get_size) echo 1M ;;
                pread) dd if=/dev/zero count=$3 iflag=count_bytes ;;
                *) exit 2 ;;
            esac

        this is the server:

            nbdcaptive sh ./disk.sh --run 'nbdinfo --size \"$uri\"'
        ",
    parameters: &[Parameter {
        key: "script",
        value: "<FILENAME>",
        help: "the script to run; '-' reads it from stdin. Other parameters are the script's",
        required: true,
    }],
    magic_key: Some("script"),
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The longest script that is read from stdin, in bytes.
const INLINE: usize = 16 * 1024 * 1024;

/// The script that came by stdin. It is read before there is any other process, for later stdin is the command's.
static INLINE_SCRIPT: OnceLock<Vec<u8>> = OnceLock::new();

/// Reads the script from stdin if the command line says so. Errors: a line for people.
pub fn read_inline(options: &Options) -> Result<(), String> {
    let is_inline = options.plugin.as_deref() == Some("sh".as_ref())
        && options.parameters.first().is_some_and(|first| match split_parameter(first) {
            Word::Bare(value) => value == "-",
            Word::KeyValue(key, value) => key == "script" && value == "-",
        });
    if !is_inline {
        return Ok(());
    }
    if options.single {
        return Err("inline script is incompatible with -s".to_owned());
    }
    let text = kept::read_input(INLINE).map_err(|error| format!("sh: cannot read the inline script: {error}"))?;
    let _ = INLINE_SCRIPT.set(text);
    Ok(())
}

/// The plugin.
#[derive(Debug, Default)]
pub struct Sh {
    server: Option<Server>,
    scripts: Option<Arc<Scripts>>,
    /// The key for further values without one.
    magic_key: Option<String>,
}

impl Sh {
    fn load(&mut self, path: &Path) -> Result<(), ConfigError> {
        let directory = script::directory()?;
        let path = if path == Path::new("-") {
            let Some(text) = INLINE_SCRIPT.get() else {
                return Err(ConfigError("an inline script must be the first parameter".to_owned()));
            };
            script::write_script(&directory, "inline-script.sh", text)
                .map_err(|error| ConfigError(format!("cannot keep the inline script: {error}")))?
        } else {
            path.canonicalize().map_err(|error| ConfigError(format!("realpath: {}: {error}", path.display())))?
        };
        let source = Source::One(script::c_path(&path)?);
        let scripts = Arc::new(Scripts::new(source, &directory, self.server.clone()));
        self.scripts = Some(Arc::clone(&scripts));
        scripts.starting("load", &[])?;
        let key = scripts.starting_line("magic_config_key")?;
        self.magic_key = key.map(|key| String::from_utf8_lossy(&key).into_owned());
        Ok(())
    }

    fn scripts(&self) -> Result<&Arc<Scripts>, ConfigError> {
        self.scripts.as_ref().ok_or_else(|| ConfigError("missing script parameter".to_owned()))
    }
}

impl Plugin for Sh {
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
        let Some(scripts) = &self.scripts else {
            return match key {
                "script" => self.load(value.path()).map_err(|ConfigError(why)| {
                    let path = value.path().display();
                    ConfigError(why.replacen("script:", &format!("{path}:"), 1))
                }),
                _ => Err(ConfigError("the first parameter must be script=/path/to/script".to_owned())),
            };
        };
        let Source::One(path) = &scripts.source else { return Ok(()) };
        let path = path.to_string_lossy();
        let key = match (key, &self.magic_key) {
            ("script", Some(key)) => key,
            ("script", None) => {
                let value = value.0.to_string_lossy();
                return Err(ConfigError(format!("{path}: expecting key=value on the command line but got: {value}")));
            }
            (key, _) => key,
        };
        match scripts.starting("config", &[key.as_bytes(), value.bytes()])? {
            true => Ok(()),
            false => Err(ConfigError(format!("{path}: this plugin does not need command line configuration"))),
        }
    }

    fn config_complete(&mut self) -> Result<(), ConfigError> {
        self.scripts()?.starting("config_complete", &[]).map(drop)
    }

    fn dump(&mut self) -> Result<(Option<ThreadModel>, Vec<u8>), ConfigError> {
        match &self.scripts {
            Some(scripts) => Ok((Some(scripts.thread_model()?), scripts.dump()?)),
            None => Ok((None, format!("max_known_status={}\n", script::MAX_KNOWN_STATUS).into_bytes())),
        }
    }

    fn after_fork(&mut self) -> Option<Step> {
        let scripts = self.scripts.clone()?;
        Some(Box::new(move || scripts.starting("after_fork", &[]).map(drop)))
    }

    fn ready(self: Box<Self>) -> Result<Arc<dyn Exports>, ConfigError> {
        Arc::clone(self.scripts()?).exports()
    }
}
