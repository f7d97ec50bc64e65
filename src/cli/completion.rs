//! `--completion`: the scripts that complete command lines in shells.
//!
//! They are short, because they know nothing of options, plugins and parameters: at each Tab they ask the program that is being
//! typed ([`super::candidates`]), so what is offered is what that very program takes. `clap_complete` was tried on paper: what it
//! generates knows options and file names, but neither nbdkit's `key=value` words after the plugin's name, which depend on the
//! plugin and on every filter before it, nor names cut short.

/// A shell that there is a script for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shell {
    /// bash 4.4 and later; its bash-completion is not needed.
    Bash,
    /// zsh, with `compinit`.
    Zsh,
    /// fish 3.5 and later.
    Fish,
}

/// By name, as help lists them.
const SHELLS: [(&str, Shell); 3] = [("bash", Shell::Bash), ("zsh", Shell::Zsh), ("fish", Shell::Fish)];

impl Shell {
    /// The shell of that name. Errors: there is none, as a line.
    pub fn find(name: &str) -> Result<Shell, String> {
        let found = SHELLS.iter().find(|(known, _)| *known == name);
        found.map(|(_, shell)| *shell).ok_or_else(|| format!("--completion must be bash, zsh or fish: \"{name}\""))
    }

    /// What the shell is to read.
    pub fn script(self) -> &'static str {
        match self {
            Shell::Bash => include_str!("completion/nbdcaptive.bash"),
            Shell::Zsh => include_str!("completion/_nbdcaptive"),
            Shell::Fish => include_str!("completion/nbdcaptive.fish"),
        }
    }
}
