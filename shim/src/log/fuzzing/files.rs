//! The files of a log that the input describes.

use std::{collections::BTreeMap, fs, io, path::Path};

use crate::log::format::{OFFSET_MAX, Record, RecordKind, SegmentHeader};

/// The writer has numbers left for what it is given to write, as any writer has.
const NUMBER_MAX: u64 = OFFSET_MAX >> 1;

/// What of the input is left.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, len: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A field of an index: small, more or less than `last`, as large as can be, or any.
    pub(super) fn field(&mut self, last: u64) -> Option<u64> {
        Some(match self.byte()? {
            small @ 0..0x80 => last.wrapping_add(u64::from(small)),
            less @ 0x80..0xc0 => last.wrapping_sub(u64::from(less & 0x3f)),
            0xc0..0xe0 => last.wrapping_add(u64::from(u16::from_le_bytes(self.bytes()?))),
            0xe0..0xf0 => u64::from(self.byte()?),
            0xf0..0xf8 => u64::MAX - u64::from(self.byte()?),
            0xf8..0xfc => OFFSET_MAX - u64::from(self.byte()?),
            _ => u64::from_le_bytes(self.bytes()?),
        })
    }

    /// The number in the name of a closed segment; `None` within for the one being written.
    fn number(&mut self) -> Option<Option<u64>> {
        Some(match self.byte()? {
            0..0x60 => None,
            0xff => Some(u64::MAX),
            0xfe => Some(u64::MAX - 1),
            0xfd => Some(NUMBER_MAX),
            number => Some(u64::from(number % 8)),
        })
    }
}

/// The bytes of each data file and of each index, in the order of the stream.
#[derive(Debug, Default)]
pub(super) struct Files {
    data: BTreeMap<Name, Vec<u8>>,
    index: BTreeMap<Name, Vec<u8>>,
}

/// Closed segments come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Closed(u64),
    Current,
}

impl Name {
    fn new(number: Option<u64>) -> Name {
        number.map_or(Name::Current, Name::Closed)
    }

    fn file(self) -> String {
        match self {
            Name::Closed(number) => format!("stdout.{number}"),
            Name::Current => "stdout".into(),
        }
    }
}

impl Files {
    /// What the input describes, up to the end of a list of files.
    pub(super) fn read(input: &mut Input<'_>) -> Files {
        let mut files = Files::default();
        while files.add(input).is_some() {}
        files
    }

    /// `None` at the end of the list.
    fn add(&mut self, input: &mut Input<'_>) -> Option<()> {
        let what = input.byte()? % 8;
        if what == 7 {
            return None;
        }
        let name = Name::new(input.number()?);
        match what {
            // A few bytes.
            0 => {
                let len = usize::from(input.byte()?);
                let bytes = input.take(len).to_vec();
                self.data.entry(name).or_default().extend(bytes);
            }
            // Many lines.
            1 => {
                let (lines, len) = (usize::from(input.byte()?), usize::from(input.byte()?) * 4);
                let line = |n: usize| [vec![b'a' + (n % 26) as u8; len], vec![b'\n']].concat();
                self.data.entry(name).or_default().extend((0..lines).flat_map(line));
            }
            // An index, or more records of one.
            2..=4 => {
                let index = self.index.entry(name).or_default();
                if index.is_empty() {
                    index.extend(header(input, name)?.encode());
                }
                records(input, index)?;
            }
            // Any bytes in place of an index, or behind one.
            5 => {
                let len = usize::from(input.byte()?);
                let bytes = input.take(len).to_vec();
                self.index.entry(name).or_default().extend(bytes);
            }
            // An index that is cut off.
            _ => {
                let len = usize::from(input.byte()?);
                let index = self.index.entry(name).or_default();
                index.truncate(index.len().saturating_sub(len));
            }
        }
        Some(())
    }

    /// Makes these the files of `dir`, and the only ones.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            fs::remove_file(entry?.path())?;
        }
        for (name, bytes) in &self.data {
            fs::write(dir.join(name.file()), bytes)?;
        }
        for (name, bytes) in &self.index {
            fs::write(dir.join(format!("{}.idx", name.file())), bytes)?;
        }
        Ok(())
    }

    /// What somebody who reads the log gets: names that no writer of ours makes are no part of it.
    pub(super) fn output(&self) -> Vec<u8> {
        let ours = |name: &Name| !matches!(name, Name::Closed(number) if *number > OFFSET_MAX);
        self.data.iter().filter(|(name, _)| ours(name)).flat_map(|(_, bytes)| bytes.clone()).collect()
    }
}

fn header(input: &mut Input<'_>, name: Name) -> Option<SegmentHeader> {
    let number = match name {
        Name::Closed(number) => number,
        Name::Current => 8,
    };
    // Mostly its own.
    let number = if input.byte()? < 0xc0 { number } else { input.field(number)? };
    let number = if number > OFFSET_MAX { number } else { number.min(NUMBER_MAX) };
    Some(SegmentHeader {
        number,
        first_offset: input.field(0)?,
        timeline: input.field(0)?,
        epoch: input.field(0)?,
        created_ns: input.field(0)?,
    })
}

fn records(input: &mut Input<'_>, index: &mut Vec<u8>) -> Option<()> {
    let (mut stream_offset, mut file_offset, mut time_ns) = (0, 0, 0);
    for _ in 0..input.byte()? {
        let kind = if input.byte()? < 0xc0 { RecordKind::Write } else { RecordKind::Gap };
        stream_offset = input.field(stream_offset)?;
        file_offset = input.field(file_offset)?;
        time_ns = input.field(time_ns)?;
        index.extend(Record { kind, stream_offset, file_offset, time_ns }.encode());
    }
    Some(())
}
