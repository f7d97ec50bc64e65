//! The directory with the disks and sockets, and who cleans it up.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::Result;
use crate::rows::{Disk, IMAGE_SIZE, Row, SIZE};

/// A private directory, and a shell that removes it.
///
/// The shell reads the pid of the server that runs from a pipe. At the pipe's end, which comes even when this program
/// is killed, it ends that server and removes the directory; so there is one way of cleaning up, and it always happens.
pub struct Workspace {
    pub dir: PathBuf,
    cleaner: Child,
    /// Gone only in `drop`.
    pids: Option<ChildStdin>,
}

impl Workspace {
    /// With the disks that `rows` need.
    pub fn create(parent: &Path, rows: &[Row]) -> Result<Workspace> {
        let said = |error: io::Error| format!("{}: {error}", parent.display());
        let parent = parent.canonicalize().map_err(said)?;
        let dir = parent.join(format!("nbd-bench.{}", std::process::id()));
        // sun_path has 108 bytes with its final NUL.
        if dir.as_os_str().len() + "/socket".len() > 107 {
            return Err(format!("{}: too long for a Unix socket; choose another --dir", dir.display()));
        }
        DirBuilder::new().mode(0o700).create(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let script = "trap '' HUP INT QUIT TERM; pid=
            while read -r line; do pid=$line; done
            if [ -n \"$pid\" ]; then kill \"$pid\" 2>/dev/null; fi
            rm -rf -- \"$1\"";
        let spawned =
            Command::new("sh").arg("-c").arg(script).arg("sh").arg(&dir).current_dir("/").stdin(Stdio::piped()).spawn();
        let mut cleaner = match spawned {
            Ok(cleaner) => cleaner,
            Err(error) => {
                let _ = fs::remove_dir(&dir);
                return Err(format!("sh: {error}"));
            }
        };
        let pids = cleaner.stdin.take();
        let workspace = Workspace { dir, cleaner, pids };
        for (disk, size, data_in) in
            [(Disk::File, SIZE, 1), (Disk::Sparse, IMAGE_SIZE, 16), (Disk::Full, IMAGE_SIZE, 1)]
        {
            if rows.iter().any(|row| row.disk == disk) {
                let path = workspace.disk(disk);
                write_disk(&path, size, data_in).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
        Ok(workspace)
    }

    /// The file that is this disk.
    pub fn disk(&self, disk: Disk) -> PathBuf {
        self.dir.join(match disk {
            Disk::Sparse => "sparse",
            Disk::Full => "full",
            Disk::File | Disk::Memory | Disk::Null => "disk",
        })
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// What the server says on stderr.
    pub fn server_log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Tells the cleaner which server runs; empty for none.
    pub fn note(&self, pid: &str) -> Result<()> {
        match &self.pids {
            Some(pids) => {
                let mut pids: &ChildStdin = pids;
                pids.write_all(format!("{pid}\n").as_bytes()).map_err(|error| format!("sh: {error}"))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        drop(self.pids.take());
        let _ = self.cleaner.wait();
    }
}

/// Fills one MiB of each `data_in` with something that no server can take for a hole, and leaves holes between.
fn write_disk(path: &Path, size: u64, data_in: u64) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.set_len(size)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = Vec::with_capacity(1 << 20);
    for number in (0..size >> 20).step_by(data_in as usize) {
        block.clear();
        while block.len() < 1 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        file.seek(SeekFrom::Start(number << 20))?;
        file.write_all(&block)?;
    }
    file.sync_all()
}

/// Leaves the file in the page cache, with nothing to write back: no server pays for what another has written.
pub fn settle(path: &Path) -> Result<()> {
    let settled = (|| {
        let mut file = File::open(path)?;
        file.sync_all()?;
        let mut block = vec![0; 1 << 20];
        while file.read(&mut block)? > 0 {}
        Ok::<_, io::Error>(())
    })();
    settled.map_err(|error| format!("{}: {error}", path.display()))
}
