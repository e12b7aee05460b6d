//! What the help says at length.

pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0    done; also if the reader of the output went away (as in `cubecli logs ID | head`)
  1    an error, which is on standard error
  2    the command line is wrong
  3    no container, sandbox or log with this ID
  4    the ID is ambiguous; the candidates are on standard error
  130  interrupted (Ctrl-C), as shells report the end by SIGINT; 129 and 143: by SIGHUP and SIGTERM";

pub(super) const LOGS: &str = "\
Print the output of a container, running or deleted

The bytes come as the container wrote them. Output that was dropped in the guest (only with
cube.container.log_mode=drop-oldest), or rotated away before it was read, shows as \"[N bytes lost]\"
on standard error.";

pub(super) const WAIT: &str = "\
Wait until a sandbox is ready

It is ready when each of its containers has been started and, where the container has one of the
annotations cube.ready.http, cube.ready.tcp and cube.ready.exec, that probe has succeeded once. It is an
error if the sandbox's main container exits, or another one before it is ready.";

pub(super) const PAUSE: &str = "\
Let a sandbox stand still

Every container in it is paused at once, for containerd, too. With --to-disk its memory is written to
snapshot.dir of the configuration and then given back to the host; `cubecli cubebox resume` or `ctr task
resume` lets the sandbox go on from there, with the same processes, terminals and logs. Only sandboxes on
Cloud Hypervisor whose rootfs is on disks of their own (annotation cube.rootfs.mode=block) can be paused to
disk. A sandbox on disk does not outlive its shim or its host.";

pub(super) const SNAPSHOT: &str = "\
Take a snapshot of a sandbox, which runs on; prints the snapshot's name

Memory and disks are captured at one instant, for which the sandbox stands still. Only sandboxes on Cloud
Hypervisor whose rootfs is on disks of their own (annotation cube.rootfs.mode=block) can be snapshotted. A
snapshot holds all that is in the sandbox's memory, secrets included. Of a sandbox that is built to become a
template (annotation cube.template.id) it is taken once that is ready, which is waited for up to 10 minutes.";

pub(super) const ROLLBACK: &str = "\
Put a sandbox back to a snapshot of its own

Memory, processes and disks are what they were when the snapshot was taken, and the sandbox runs on from
there. What it has done since is gone, but its logs: they keep what they have, and go on with what is written
from then on. Processes that were started since end with status 137. A sandbox goes back to snapshots that
were taken of it, or that it was restored from; not past the exit of a container. If the new VM cannot be
brought up, the sandbox ends.";

pub(super) const RESTORE: &str = "\
Make and start a sandbox that goes on from a snapshot; prints its ID

containerd gets a container without an image: its files are in the snapshot. It may run where the
snapshot's original never was. Its output is in its log, as `cubecli logs ID` shows it; `ctr task` and
others take it from there.";

pub(super) const CP: &str = "\
Copy files out of a running container, or into it

`cp ID:PATH LOCAL` and `cp LOCAL ID:PATH` copy a file, or a directory with all in it, into a directory that exists,
else under the name given; of `DIR/.`, what is in it. `-` is standard output or input, as a tar stream. Modes, owners
(by number) and symbolic links are kept; out of a container, hard links are, too, and neither set-user-ID bits nor
devices, FIFOs and sockets. Nothing is written outside of LOCAL, whatever the container sends.

The container's own tar is run as its root, and into it its own test, as the other tools do it: a container without
them has no cp.";

pub(super) const KILL: &str = "\
Send a signal to a container, SIGKILL unless told otherwise

containerd is asked first. If it does not answer or does not know the task, its shim is asked; and if that is
gone or silent, SIGKILL ends the whole sandbox by what is on disk.";

pub(super) const RM: &str = "\
Remove a container, or a whole sandbox with the ID of its main container

containerd is asked first. What it does not know, or while it does not answer, is removed with the shim, and
without one from what is on disk, as containerd would have it done. The log stays, and so does the image. With
--force, what runs is ended by SIGKILL first.";

pub(super) const EXPORT: &str = "\
Write a snapshot into an archive, for another host

The archive is a tar file, compressed with zstd. Memory that the guest never used takes no room in it. It
holds all that is in the sandbox's memory, secrets included.";

pub(super) const IMPORT: &str = "\
Make a snapshot from an archive; prints its name

Every file is compared with its digest before the snapshot gets its name. Of an archive that is not whole,
or is of no snapshot, nothing is left, nor of one that is interrupted. It may have as much data as
snapshot.import_limit of the configuration allows. Only import what you would run: a snapshot is a whole
machine.";
