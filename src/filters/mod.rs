//! The filters: one file each, and the table of them all.

use crate::layer::{About, Filter};

pub mod blocksize;
pub mod blocksize_policy;
pub mod bzip2;
pub mod cache;
pub mod cacheextents;
pub mod checkwrite;
pub mod count;
pub mod cow;
pub mod ddrescue;
pub mod delay;
pub mod error;
pub mod evil;
pub mod exitlast;
pub mod exitwhen;
pub mod exportname;
pub mod extentlist;
pub mod fua;
pub mod gzip;
pub mod ip;
pub(crate) mod kit;
pub mod limit;
pub mod log;
pub mod lzip;
pub mod multi_conn;
pub(crate) mod next;
pub mod nocache;
pub mod noextents;
pub mod nofilter;
pub mod noparallel;
pub mod nozero;
pub mod offset;
pub mod openonce;
pub mod partition;
pub mod pause;
pub mod protect;
pub mod rate;
pub mod readahead;
pub mod readonly;
pub mod retry;
pub mod retry_request;
pub mod rotational;
pub mod scan;
pub mod spinning;
pub mod stats;
pub mod swab;
pub mod tar;
pub mod time_limit;
pub mod tls_fallback;
pub mod truncate;
pub(crate) mod unpacked;
pub(crate) mod unpacked_blocks;
pub mod xz;

/// A filter by name.
#[derive(Debug)]
pub struct Entry {
    /// What it says of itself.
    pub about: &'static About,
    /// A fresh one, to be configured.
    pub new: fn() -> Box<dyn Filter>,
}

/// Every filter, in alphabetical order, as help lists them.
pub static ALL: &[Entry] = &[
    Entry { about: &blocksize::ABOUT, new: || Box::<blocksize::Blocksize>::default() },
    Entry { about: &blocksize_policy::ABOUT, new: || Box::<blocksize_policy::Policy>::default() },
    Entry { about: &bzip2::ABOUT, new: || Box::new(bzip2::Bzip2) },
    Entry { about: &cache::ABOUT, new: || Box::<cache::Cache>::default() },
    Entry { about: &cacheextents::ABOUT, new: || Box::<cacheextents::CacheExtents>::default() },
    Entry { about: &checkwrite::ABOUT, new: || Box::new(checkwrite::CheckWrite) },
    Entry { about: &count::ABOUT, new: || Box::new(count::Count) },
    Entry { about: &cow::ABOUT, new: || Box::<cow::Cow>::default() },
    Entry { about: &ddrescue::ABOUT, new: || Box::<ddrescue::Ddrescue>::default() },
    Entry { about: &delay::ABOUT, new: || Box::<delay::Delay>::default() },
    Entry { about: &error::ABOUT, new: || Box::<error::ErrorInject>::default() },
    Entry { about: &evil::ABOUT, new: || Box::<evil::Evil>::default() },
    Entry { about: &exitlast::ABOUT, new: || Box::new(exitlast::ExitLast) },
    Entry { about: &exitwhen::ABOUT, new: || Box::<exitwhen::ExitWhen>::default() },
    Entry { about: &exportname::ABOUT, new: || Box::<exportname::ExportName>::default() },
    Entry { about: &extentlist::ABOUT, new: || Box::<extentlist::ExtentList>::default() },
    Entry { about: &fua::ABOUT, new: || Box::<fua::Fua>::default() },
    Entry { about: &gzip::ABOUT, new: || Box::new(gzip::Gzip) },
    Entry { about: &ip::ABOUT, new: || Box::<ip::Ip>::default() },
    Entry { about: &limit::ABOUT, new: || Box::<limit::Limit>::default() },
    Entry { about: &log::ABOUT, new: || Box::<log::LogFilter>::default() },
    Entry { about: &lzip::ABOUT, new: || Box::<lzip::Filter>::default() },
    Entry { about: &multi_conn::ABOUT, new: || Box::<multi_conn::MultiConn>::default() },
    Entry { about: &nocache::ABOUT, new: || Box::<nocache::NoCache>::default() },
    Entry { about: &noextents::ABOUT, new: || Box::new(noextents::NoExtents) },
    Entry { about: &nofilter::ABOUT, new: || Box::new(nofilter::NoFilter) },
    Entry { about: &noparallel::ABOUT, new: || Box::<noparallel::NoParallel>::default() },
    Entry { about: &nozero::ABOUT, new: || Box::<nozero::NoZero>::default() },
    Entry { about: &offset::ABOUT, new: || Box::<offset::Offset>::default() },
    Entry { about: &openonce::ABOUT, new: || Box::new(openonce::OpenOnce) },
    Entry { about: &partition::ABOUT, new: || Box::<partition::Partition>::default() },
    Entry { about: &pause::ABOUT, new: || Box::<pause::Pause>::default() },
    Entry { about: &protect::ABOUT, new: || Box::<protect::Protect>::default() },
    Entry { about: &rate::ABOUT, new: || Box::<rate::Rate>::default() },
    Entry { about: &readahead::ABOUT, new: || Box::new(readahead::Readahead) },
    Entry { about: &readonly::ABOUT, new: || Box::<readonly::ReadOnly>::default() },
    Entry { about: &retry::ABOUT, new: || Box::<retry::Retry>::default() },
    Entry { about: &retry_request::ABOUT, new: || Box::<retry_request::RetryRequest>::default() },
    Entry { about: &rotational::ABOUT, new: || Box::<rotational::Rotational>::default() },
    Entry { about: &scan::ABOUT, new: || Box::<scan::Scan>::default() },
    Entry { about: &spinning::ABOUT, new: || Box::<spinning::Spinning>::default() },
    Entry { about: &stats::ABOUT, new: || Box::<stats::Stats>::default() },
    Entry { about: &swab::ABOUT, new: || Box::<swab::Swab>::default() },
    Entry { about: &tar::ABOUT, new: || Box::<tar::Tar>::default() },
    Entry { about: &time_limit::ABOUT, new: || Box::<time_limit::TimeLimit>::default() },
    Entry { about: &tls_fallback::ABOUT, new: || Box::<tls_fallback::TlsFallback>::default() },
    Entry { about: &truncate::ABOUT, new: || Box::<truncate::Truncate>::default() },
    Entry { about: &xz::ABOUT, new: || Box::<xz::Filter>::default() },
];

/// The filter of that name.
pub fn find(name: &str) -> Option<&'static Entry> {
    ALL.iter().find(|entry| entry.about.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_finds_every_filter() {
        assert!(ALL.is_sorted_by_key(|entry| entry.about.name));
        for Entry { about, .. } in ALL {
            assert!(std::ptr::eq(find(about.name).expect("it is in the table").about, *about));
        }
        assert!(find("no-such-filter").is_none());
    }
}
