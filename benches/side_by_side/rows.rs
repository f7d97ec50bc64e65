//! What is measured.

/// Bytes in the disk of fio's rows.
pub const SIZE: u64 = 256 << 20;
/// Bytes in the images that are copied.
pub const IMAGE_SIZE: u64 = 1 << 30;

/// What a server serves in a row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Of [`SIZE`] bytes.
    Memory,
    /// A file of [`SIZE`] bytes, full of data.
    File,
    /// An image of [`IMAGE_SIZE`] bytes with data in one MiB of sixteen.
    Sparse,
    /// An image of [`IMAGE_SIZE`] bytes, full of data.
    Full,
    /// Nothing that matters.
    Null,
}

/// How a client reaches the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Unix,
    /// Over the loopback interface.
    Tcp,
}

/// What is done with the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Fio(Job),
    /// nbdcopy reads an image and throws it away.
    Copy,
    /// The server is started with a command that ends at once.
    Start,
    /// Clients connect, and that is all.
    Idle,
    /// Clients send requests and do not read the replies.
    Unread,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// What fio calls it.
    pub rw: &'static str,
    /// Bytes in one request.
    pub block: u64,
    /// Requests under way on one connection.
    pub depth: u32,
    /// Each of them is a connection.
    pub connections: u32,
}

impl Job {
    pub fn is_small(&self) -> bool {
        self.block < 64 << 10
    }

    fn name(&self) -> String {
        let action = match self.rw {
            "randread" => "random read",
            "randwrite" => "random write",
            "read" => "sequential read",
            "write" => "sequential write",
            _ => "mixed",
        };
        let depth = match self.connections {
            1 => format!("q{}", self.depth),
            several => format!("{several}xq{}", self.depth),
        };
        format!("{}k {action} {depth}", self.block >> 10)
    }
}

pub struct Row {
    pub disk: Disk,
    pub link: Link,
    pub work: Work,
}

/// What the numbers of a row are.
pub struct Unit {
    pub value: &'static str,
    /// Digits after the point.
    pub digits: usize,
    /// Of the server's CPU time, where that means something.
    pub cpu: Option<&'static str>,
    pub lower_is_better: bool,
}

impl Unit {
    pub fn show(&self, value: f64) -> String {
        format!("{value:.*}", self.digits)
    }
}

impl Row {
    pub fn all() -> Vec<Row> {
        let single = |rw, block, depth| Job { rw, block, depth, connections: 1 };
        let basic = [
            single("randread", 4 << 10, 1),
            single("randread", 4 << 10, 64),
            single("randwrite", 4 << 10, 1),
            single("randwrite", 4 << 10, 64),
            single("read", 256 << 10, 8),
            single("write", 256 << 10, 8),
        ];
        let several = [
            Job { rw: "randrw", block: 4 << 10, depth: 16, connections: 4 },
            Job { rw: "randread", block: 4 << 10, depth: 1, connections: 4 },
        ];
        let fio = |disk, link, job| Row { disk, link, work: Work::Fio(job) };
        let unix = |disk, work| Row { disk, link: Link::Unix, work };
        let mut rows = Vec::new();
        rows.extend(basic.map(|job| fio(Disk::Memory, Link::Unix, job)));
        rows.extend(basic.map(|job| fio(Disk::File, Link::Unix, job)));
        rows.extend(several.map(|job| fio(Disk::Memory, Link::Unix, job)));
        rows.extend([Disk::Sparse, Disk::Full].map(|disk| unix(disk, Work::Copy)));
        rows.extend(basic.map(|job| fio(Disk::Memory, Link::Tcp, job)));
        rows.push(unix(Disk::Null, Work::Start));
        rows.extend([Work::Idle, Work::Unread].map(|work| unix(Disk::Memory, work)));
        rows
    }

    pub fn name(&self) -> String {
        match self.work {
            Work::Fio(job) => {
                let link = if self.link == Link::Tcp { "tcp " } else { "" };
                let disk = if self.disk == Disk::Memory { "memory" } else { "file" };
                format!("{link}{disk} {}", job.name())
            }
            Work::Copy if self.disk == Disk::Sparse => "nbdcopy sparse to null".to_string(),
            Work::Copy => "nbdcopy full to null".to_string(),
            Work::Start => "start and stop".to_string(),
            Work::Idle => "idle connections".to_string(),
            Work::Unread => "unread replies".to_string(),
        }
    }

    pub fn unit(&self) -> Unit {
        let lower = |value, digits, cpu| Unit { value, digits, cpu, lower_is_better: true };
        let higher = |value, cpu| Unit { value, digits: 0, cpu: Some(cpu), lower_is_better: false };
        match self.work {
            Work::Fio(job) if job.is_small() => higher("IOPS", "s/million"),
            Work::Fio(_) | Work::Copy => higher("MB/s", "s/GB"),
            Work::Start => lower("ms", 2, Some("ms")),
            Work::Idle => lower("KiB each", 1, None),
            Work::Unread => lower("MiB", 1, None),
        }
    }

    /// Whether `--pin` means something to it: where there is a server and a client that keep two cpus busy.
    pub fn is_pinned(&self) -> bool {
        matches!(self.work, Work::Fio(_) | Work::Copy)
    }
}
