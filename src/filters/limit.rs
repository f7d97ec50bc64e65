//! `limit`: so many clients at a time and no more. Source: nbdkit filters/limit/limit.c.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nbdcaptive_actors::device::{Client, Device, Error, ErrorCode, Exports, Result, ThreadModel};
use nbdcaptive_actors::filter::{self, FilterExports, Filtered, FilteredExports};

use super::kit::{optional, unknown};
use crate::layer::{About, ConfigError, Filter, Lifetime, Value};
use crate::values;

/// See the module.
pub static ABOUT: About = About {
    name: "limit",
    summary: "limit the number of clients

        Any further ones are refused until one has left.

        # Examples

            nbdcaptive --filter=limit memory 1M limit=4 --run 'nbdinfo \"$uri\"'
        ",
    parameters: &[optional("limit", "<N>", "how many there may be at a time, 1 unless given; 0 for any number")],
    magic_key: None,
    thread_model: ThreadModel::Parallel,
    dump: &[],
};

/// The filter.
#[derive(Debug)]
pub struct Limit(u32);

impl Default for Limit {
    fn default() -> Limit {
        Limit(1)
    }
}

impl Filter for Limit {
    fn config(&mut self, key: &str, value: Value<'_>) -> std::result::Result<(), ConfigError> {
        match key {
            "limit" => self.0 = values::unsigned(key, value.text(key)?).map_err(ConfigError)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn ready(
        self: Box<Self>,
        next: Arc<dyn Exports>,
        _lifetime: &mut Lifetime,
    ) -> std::result::Result<Arc<dyn Exports>, ConfigError> {
        Ok(Arc::new(FilteredExports(Limited { next, limit: self.0, clients: Arc::default() })))
    }
}

struct Limited {
    next: Arc<dyn Exports>,
    limit: u32,
    /// How many exports are open.
    clients: Arc<AtomicU32>,
}

fn too_many() -> Error {
    Error::failed(ErrorCode::NotPermitted, "limit: too many clients connected, connection rejected")
}

impl FilterExports for Limited {
    fn next(&self) -> &dyn Exports {
        &*self.next
    }

    fn looks_at_clients(&self) -> bool {
        true
    }

    /// Before a client has cost anything. It is counted when it opens an export, because it may not come so far.
    fn preconnect(&self, client: &Client) -> Result<()> {
        if self.next.looks_at_clients() {
            self.next.preconnect(client)?;
        }
        if self.limit > 0 && self.clients.load(Ordering::SeqCst) >= self.limit {
            return Err(too_many());
        }
        Ok(())
    }

    fn open(&self, client: &Client) -> Result<Box<dyn Device>> {
        // Again, because many may have come before the first of them opened an export.
        let room = |count| (self.limit == 0 || count < self.limit).then_some(count + 1);
        self.clients.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room).map_err(|_| too_many())?;
        let place = Place(Arc::clone(&self.clients));
        Ok(Box::new(Filtered(Disk { next: self.next.open(client)?, _place: place })))
    }
}

/// Counts a client for as long as it is there.
struct Place(Arc<AtomicU32>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Disk {
    next: Box<dyn Device>,
    _place: Place,
}

impl filter::Filter for Disk {
    fn next(&self) -> &dyn Device {
        &*self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filters::kit::testing::{memory, over};

    #[test]
    fn a_client_that_has_left_makes_room() {
        let exports = over(memory("1M"), "limit", &[("limit", "2")]).unwrap();
        let client = Client::default();
        let first = exports.open(&client).unwrap();
        let _second = exports.open(&client).unwrap();
        assert!(exports.open(&client).is_err());
        assert!(exports.preconnect(&client).is_err());
        drop(first);
        exports.preconnect(&client).unwrap();
        exports.open(&client).unwrap();
    }

    #[test]
    fn a_limit_of_0_is_none() {
        let exports = over(memory("1M"), "limit", &[("limit", "0")]).unwrap();
        let open: Vec<_> = (0..100).map(|_| exports.open(&Client::default())).collect();
        assert!(open.iter().all(|one| one.is_ok()));
    }
}
