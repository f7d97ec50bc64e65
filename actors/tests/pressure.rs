//! Who waits for whom: a device that takes its time holds up those who asked it and nobody else, is asked as many things at
//! once as was agreed and never more, and a client that asks for much leaves the others their turn. Public API only.
//!
//! Nothing here measures time. A device waits at a gate that the test holds, so what is answered meanwhile did not wait for it.

#[path = "pressure/fairness.rs"]
mod fairness;
#[path = "pressure/parallel.rs"]
mod parallel;
#[path = "pressure/rig.rs"]
mod rig;
#[path = "pressure/thread_models.rs"]
mod thread_models;
