//! Files of a log, and the binary format of their index.
//!
//! A log directory holds, for each stream (`stdout`, `stderr`):
//!
//! ```text
//! stdout            the segment being written: raw bytes, nothing added
//! stdout.idx        its index
//! stdout.7          closed segments, a higher number is newer; numbers are never used again
//! stdout.7.idx      and their indices
//! ```
//!
//! An index is a [`SegmentHeader`], then [`Record`]s in the order of their file offsets. The data
//! file is the truth: a record is written after its data, at most one per 4 KiB or millisecond, so
//! bytes may follow the last record. The stream offset of the segment's end is that of its last
//! record (or of its header) plus the bytes that the file has beyond that record's file offset.
//! A torn or damaged record ends the index; what follows it is indexed anew by the writer.
//!
//! A segment belongs to one timeline of the sandbox. Inside of it stream offsets only grow. The next one
//! begins where it ends, or, if the sandbox was put back to a snapshot, at an earlier offset or a later one,
//! on another timeline; both were written, in the order of their numbers. The header with the other timeline
//! is what says that the stream went back: the segment before it is complete by then, and no byte is behind
//! it yet.

/// First bytes of an index file.
pub const MAGIC: [u8; 8] = *b"CUBEIDX1";

/// Bytes in a [`SegmentHeader`].
pub const HEADER_LEN: usize = 64;

/// Bytes in a [`Record`].
pub const RECORD_LEN: usize = 32;

/// No file is longer, and no stream gets as far, as this offset (`off_t` of POSIX); no log has so many
/// segments. What claims to is damaged.
pub const OFFSET_MAX: u64 = i64::MAX as u64;

/// What the segment is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Number that the segment gets when it is closed; 1 for a stream's first.
    pub number: u64,
    /// Stream offset of the first byte of the data file.
    pub first_offset: u64,
    /// Timeline that its bytes belong to; 0 if none was known yet, which only an empty segment has.
    pub timeline: u64,
    /// Epoch of the stream; 0 if it was not known yet.
    pub epoch: u64,
    /// Wall clock when it was begun, nanoseconds since 1970.
    pub created_ns: u64,
}

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// A write begins here.
    Write = 1,
    /// Output was dropped in the guest, or somebody has taken away the files that it was in: the stream goes
    /// on at this record's `stream_offset`. What is missing is the difference to where the stream was.
    Gap = 2,
}

/// Where in the stream and when a place in the data file was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What the record says.
    pub kind: RecordKind,
    /// Offset in the stream of the byte at `file_offset`.
    pub stream_offset: u64,
    /// Offset in the data file.
    pub file_offset: u64,
    /// Wall clock of the write, nanoseconds since 1970.
    pub time_ns: u64,
}

/// Bytes that are not an index of this format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not an index, or one of another version.
    #[error("the file does not begin with {MAGIC:?}")]
    Magic,
    /// The checksum does not match: torn or damaged.
    #[error("checksum mismatch")]
    Checksum,
    /// A record kind that this version does not know.
    #[error("record kind {0} is not known")]
    Kind(u8),
    /// An offset or a segment number that is above [`OFFSET_MAX`].
    #[error("{0} is no offset and no segment number")]
    Range(u64),
}

impl SegmentHeader {
    /// The header as it is in the file: magic, five fields, zeros, CRC-32 of what precedes it.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..8].copy_from_slice(&MAGIC);
        let fields = [self.number, self.first_offset, self.timeline, self.epoch, self.created_ns];
        for (slot, field) in out[8..48].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        let checksum = crc32fast::hash(&out[..60]);
        out[60..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<SegmentHeader, FormatError> {
        if bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        if crc32fast::hash(&bytes[..60]).to_le_bytes() != bytes[60..] {
            return Err(FormatError::Checksum);
        }
        let field = |n: usize| u64_at(bytes, 8 + 8 * n);
        Ok(SegmentHeader {
            number: in_range(field(0))?,
            first_offset: in_range(field(1))?,
            timeline: field(2),
            epoch: field(3),
            created_ns: field(4),
        })
    }
}

impl Record {
    /// The record as it is in the file: kind, three zeros, CRC-32 of the other 28 bytes, three fields.
    pub fn encode(&self) -> [u8; RECORD_LEN] {
        let mut out = [0; RECORD_LEN];
        out[0] = self.kind as u8;
        for (slot, field) in
            out[8..].chunks_exact_mut(8).zip([self.stream_offset, self.file_offset, self.time_ns])
        {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        let checksum = record_checksum(&out);
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a record.
    pub fn decode(bytes: &[u8; RECORD_LEN]) -> Result<Record, FormatError> {
        if record_checksum(bytes).to_le_bytes() != bytes[4..8] {
            return Err(FormatError::Checksum);
        }
        let kind = match bytes[0] {
            1 => RecordKind::Write,
            2 => RecordKind::Gap,
            other => return Err(FormatError::Kind(other)),
        };
        Ok(Record {
            kind,
            stream_offset: in_range(u64_at(bytes, 8))?,
            file_offset: in_range(u64_at(bytes, 16))?,
            time_ns: u64_at(bytes, 24),
        })
    }
}

fn record_checksum(bytes: &[u8; RECORD_LEN]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..4]);
    hasher.update(&bytes[8..]);
    hasher.finalize()
}

fn in_range(offset: u64) -> Result<u64, FormatError> {
    if offset <= OFFSET_MAX { Ok(offset) } else { Err(FormatError::Range(offset)) }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_record() -> impl Strategy<Value = Record> {
        (any::<bool>(), ..=OFFSET_MAX, ..=OFFSET_MAX, any::<u64>()).prop_map(
            |(gap, stream_offset, file_offset, time_ns)| Record {
                kind: if gap { RecordKind::Gap } else { RecordKind::Write },
                stream_offset,
                file_offset,
                time_ns,
            },
        )
    }

    proptest! {
        #[test]
        fn a_record_survives_the_disk_and_no_single_damaged_byte_goes_unseen(
            record in any_record(), at in 0..RECORD_LEN, damage in 1u8..,
        ) {
            let mut bytes = record.encode();
            prop_assert_eq!(Record::decode(&bytes), Ok(record));
            bytes[at] ^= damage;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn a_header_survives_the_disk_and_no_single_damaged_byte_goes_unseen(
            number in ..=OFFSET_MAX, first_offset in ..=OFFSET_MAX, fields in any::<[u64; 3]>(),
            at in 0..HEADER_LEN, damage in 1u8..,
        ) {
            let [timeline, epoch, created_ns] = fields;
            let header = SegmentHeader { number, first_offset, timeline, epoch, created_ns };
            let mut bytes = header.encode();
            prop_assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
            bytes[at] ^= damage;
            prop_assert!(SegmentHeader::decode(&bytes).is_err());
        }
    }

    #[test]
    fn what_no_file_and_no_stream_reaches_is_refused_whatever_its_checksum() {
        let record = Record { kind: RecordKind::Gap, stream_offset: 0, file_offset: 0, time_ns: u64::MAX };
        let header =
            SegmentHeader { number: 1, first_offset: 0, timeline: 0, epoch: 0, created_ns: u64::MAX };
        let refused = FormatError::Range(OFFSET_MAX + 1);
        for beyond in [
            Record { stream_offset: OFFSET_MAX + 1, ..record },
            Record { file_offset: OFFSET_MAX + 1, ..record },
        ] {
            assert_eq!(Record::decode(&beyond.encode()), Err(refused));
        }
        for beyond in [
            SegmentHeader { number: OFFSET_MAX + 1, ..header },
            SegmentHeader { first_offset: OFFSET_MAX + 1, ..header },
        ] {
            assert_eq!(SegmentHeader::decode(&beyond.encode()), Err(refused));
        }
    }

    #[test]
    fn zeros_are_no_record() {
        assert_eq!(Record::decode(&[0; RECORD_LEN]), Err(FormatError::Checksum));
    }
}
