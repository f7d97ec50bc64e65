//! Calls that may wait and that belong to no server, on threads of their own.

use std::sync::LazyLock;

use nbdcaptive_actors::Pool;

/// Makes `call` where it holds nobody up: see [`Pool::unblock`].
pub async fn unblock<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    static POOL: LazyLock<Pool> = LazyLock::new(Pool::default);
    POOL.unblock(call).await
}
