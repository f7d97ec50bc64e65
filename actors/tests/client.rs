//! The client against the engine of this crate, and against servers that do what no server should. Start with `rig.rs`.

#[path = "client/contexts.rs"]
mod contexts;
#[path = "client/engine.rs"]
mod engine;
#[path = "client/hostile.rs"]
mod hostile;
#[path = "client/rig.rs"]
mod rig;
