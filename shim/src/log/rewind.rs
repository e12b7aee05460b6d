//! A stream that goes back, because its sandbox is put back to an earlier snapshot.
//!
//! The log keeps what it has: the bytes were written, whatever became of the process that wrote them. What
//! follows is a segment of its own, whose header names the stream offset that the stream went back to, and
//! the new timeline. That header is the whole change: until it is on disk, the log ends where the old timeline
//! has ended, and after that, where the new one begins.

use super::{
    segment::index_name,
    writer::{Identity, LogWriter, Stalled},
};

impl LogWriter {
    /// The stream goes on at `offset`, below or above where it was, on `timeline`, which is another one.
    ///
    /// After an error the log has gone back all the same, but the disk does not say so yet. It will before it
    /// has any byte that is appended from now on; [`safe_offset`](LogWriter::safe_offset) tells.
    ///
    /// An attached reader that needs the oldest segment is not waited for: the log may have one more than its
    /// limit then, until it rotates again.
    pub fn rewind(&mut self, offset: u64, timeline: u64) -> Result<(), Stalled> {
        self.next_offset = offset;
        self.identity = Identity { timeline, ..self.identity };
        self.goes_back = true;
        self.go_back()
    }

    /// Does what is left to be done of [`rewind`](LogWriter::rewind). First of all else that writes.
    pub(super) fn go_back(&mut self) -> Result<(), Stalled> {
        if !self.goes_back {
            return Ok(());
        }
        self.with_space(|writer| {
            writer.keep_place()?;
            // What the old segment lacks, above all the record of a gap.
            writer.settle()?;
            if writer.is_in_memory() {
                return Ok(writer.begin_in_memory()?);
            }
            let identity = writer.identity;
            match &mut writer.current {
                Some(segment) if segment.is_empty() => {
                    let mut header = segment.header;
                    header.first_offset = writer.next_offset;
                    (header.timeline, header.epoch) = (identity.timeline, identity.epoch);
                    let name = index_name(writer.stream);
                    let written = segment.rewrite_header(header);
                    written.map_err(|e| writer.dir.error("cannot write the log index", &name, e))?;
                }
                _ => {
                    writer.make_way()?;
                    writer.close_current()?;
                    cube_fault::point("rewind.segment_closed");
                    writer.begin_segment()?;
                }
            }
            cube_fault::point("rewind.segment_begun");
            Ok(())
        })?;
        self.goes_back = false;
        Ok(())
    }
}
