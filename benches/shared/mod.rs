//! The command line that benchmarks have in common: numbers, and the two programs that are compared.

use std::path::PathBuf;

/// The programs, as the command line names them.
pub struct Programs {
    pub nbdcaptive: PathBuf,
    pub nbdkit: PathBuf,
}

/// Reads the command line: the options of `numbers` into these, and `--nbdcaptive` and `--nbdkit`. `None`: help was asked for,
/// and given. Errors: an option that there is not, or whose value is none; a line for people.
pub fn options(help: &str, numbers: &mut [(&str, &mut usize)]) -> Result<Option<Programs>, String> {
    let mut ours = option_env!("CARGO_BIN_EXE_nbdcaptive").map(PathBuf::from);
    let mut nbdkit = PathBuf::from("nbdkit");
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let mut value = || words.next().ok_or(format!("{name} needs a value"));
        match name.as_str() {
            "--nbdcaptive" => ours = Some(value()?.into()),
            "--nbdkit" => nbdkit = value()?.into(),
            "--help" => {
                print!("{help}");
                return Ok(None);
            }
            // Given by cargo.
            "--bench" => {}
            other => match numbers.iter_mut().find(|(known, _)| *known == other) {
                Some((_, number)) => **number = value()?.parse().map_err(|_| format!("{name} needs a number"))?,
                None => return Err(format!("{other}: unknown option\n\n{help}")),
            },
        }
    }
    let nbdcaptive = ours.ok_or("--nbdcaptive PATH is needed where cargo did not build it")?;
    Ok(Some(Programs { nbdcaptive, nbdkit }))
}
