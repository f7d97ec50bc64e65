//! The plugins: one file each, and the table of them all.

use crate::layer::{About, Plugin};

pub mod data;
pub mod eval;
pub mod example1;
pub mod example2;
pub mod file;
pub mod full;
pub mod info;
mod made;
pub mod memory;
pub mod nbd;
pub mod null;
pub mod ondemand;
pub mod ones;
pub mod partitioning;
pub mod pattern;
pub mod random;
mod regions;
pub mod sh;
pub mod sparse_random;
pub mod split;
pub mod tmpdisk;
pub mod zero;

/// A plugin by name.
#[derive(Debug)]
pub struct Entry {
    /// What it says of itself.
    pub about: &'static About,
    /// A fresh one, to be configured.
    pub new: fn() -> Box<dyn Plugin>,
}

/// Every plugin, in alphabetical order, as help lists them.
pub static ALL: &[Entry] = &[
    Entry { about: &data::ABOUT, new: || Box::<data::Data>::default() },
    Entry { about: &eval::ABOUT, new: || Box::<eval::Eval>::default() },
    Entry { about: &example1::ABOUT, new: || Box::new(example1::Example1) },
    Entry { about: &example2::ABOUT, new: || Box::<example2::Example2>::default() },
    Entry { about: &file::ABOUT, new: || Box::<file::File>::default() },
    Entry { about: &full::ABOUT, new: || Box::<full::Full>::default() },
    Entry { about: &info::ABOUT, new: || Box::<info::Info>::default() },
    Entry { about: &memory::ABOUT, new: || Box::<memory::Memory>::default() },
    Entry { about: &nbd::ABOUT, new: || Box::<nbd::Nbd>::default() },
    Entry { about: &null::ABOUT, new: || Box::<null::Null>::default() },
    Entry { about: &ondemand::ABOUT, new: || Box::<ondemand::OnDemand>::default() },
    Entry { about: &ones::ABOUT, new: || Box::<ones::Ones>::default() },
    Entry { about: &partitioning::ABOUT, new: || Box::<partitioning::Partitioning>::default() },
    Entry { about: &pattern::ABOUT, new: || Box::<pattern::Pattern>::default() },
    Entry { about: &random::ABOUT, new: || Box::<random::Random>::default() },
    Entry { about: &sh::ABOUT, new: || Box::<sh::Sh>::default() },
    Entry { about: &sparse_random::ABOUT, new: || Box::<sparse_random::SparseRandom>::default() },
    Entry { about: &split::ABOUT, new: || Box::<split::Split>::default() },
    Entry { about: &tmpdisk::ABOUT, new: || Box::<tmpdisk::TmpDisk>::default() },
    Entry { about: &zero::ABOUT, new: || Box::new(zero::Zero) },
];

/// The plugin of that name.
pub fn find(name: &str) -> Option<&'static Entry> {
    ALL.iter().find(|entry| entry.about.name == name)
}

/// What the plugins' tests share.
#[cfg(test)]
pub(crate) mod testing {
    use std::ffi::OsStr;
    use std::sync::Arc;

    use nbdcaptive_actors::device::Exports;

    use crate::layer::{ConfigError, Value};

    /// Configures the plugin `name` as the command line would.
    pub fn ready(name: &str, parameters: &[(&str, &OsStr)]) -> Result<Arc<dyn Exports>, ConfigError> {
        let mut plugin = (super::find(name).expect("a plugin of that name").new)();
        for (key, value) in parameters {
            plugin.config(key, Value(value))?;
        }
        plugin.config_complete()?;
        plugin.ready()
    }

    /// The same numbers on every run, for tests that try many things. Source: Marsaglia, "Xorshift RNGs".
    pub struct Random(pub u64);

    impl Random {
        /// A number from 0 to `limit` - 1.
        pub fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }

        /// A range of at least one byte below `size`, short ones more often than long ones.
        pub fn range(&mut self, size: u64) -> std::ops::Range<u64> {
            let start = self.below(size);
            let longest = 1 << self.below(64 - u64::from(size.leading_zeros()));
            start..(start + 1 + self.below(longest)).min(size)
        }

        /// Bytes that are not all zero, and no two in a row alike.
        pub fn bytes(&mut self, length: usize) -> Vec<u8> {
            let first = self.below(255) as usize;
            (0..length).map(|i| ((first + i) % 255) as u8 + 1).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_magic_key_is_a_parameter() {
        assert!(ALL.is_sorted_by_key(|entry| entry.about.name));
        for Entry { about, .. } in ALL {
            if let Some(magic) = about.magic_key {
                assert!(about.parameters.iter().any(|parameter| parameter.key == magic), "{}", about.name);
            }
            assert!(std::ptr::eq(find(about.name).expect("it is in the table").about, *about));
        }
        assert!(find("no-such-plugin").is_none());
    }

    #[test]
    fn a_key_that_no_plugin_knows_is_an_error() {
        for entry in ALL {
            let value = crate::layer::Value(std::ffi::OsStr::new("1"));
            let mut plugin = (entry.new)();
            let taken = plugin.config("no-such-key", value).is_ok();
            assert!(!taken || plugin.takes_other_keys(), "{}", entry.about.name);
        }
    }
}
