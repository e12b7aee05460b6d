//! Archives that were changed at random, with sums that are right again: whatever they say, an import ends, and is
//! of the snapshot that was sent, or leaves nothing.

use proptest::{prelude::*, sample::Index};

use super::*;

/// A change to an archive that is not compressed.
#[derive(Debug, Clone)]
enum Change {
    /// A byte, anywhere.
    Byte(Index, u8),
    /// A field of a header: its number, at which header, with which digits.
    Field(Index, usize, Vec<u8>),
    /// A header takes the place of another record, is repeated, or goes away.
    Copy(Index, Index),
    Repeat(Index),
    Cut(Index),
    /// It ends there.
    End(Index),
}

/// Where fields of a header of GNU tar are: name, mode, size, kind, link, the sparse map, whether it goes on, the
/// real size.
const FIELDS: [(usize, usize); 12] = [
    (0, 100),
    (100, 8),
    (124, 12),
    (156, 1),
    (157, 100),
    (386, 12),
    (398, 12),
    (410, 12),
    (422, 12),
    (482, 1),
    (483, 12),
    (257, 8),
];

fn change() -> impl Strategy<Value = Change> {
    let digits = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..12),
        proptest::collection::vec(b'0'..=b'7', 1..12),
        "[0-7]{1,11}\0".prop_map(String::into_bytes),
        Just(vec![0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        Just(b"vm/memory-ranges".to_vec()),
        Just(b"S".to_vec()),
    ];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (any::<Index>(), 0..FIELDS.len(), digits)
            .prop_map(|(at, field, digits)| Change::Field(at, field, digits)),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Change::Copy(from, to)),
        any::<Index>().prop_map(Change::Repeat),
        any::<Index>().prop_map(Change::Cut),
        any::<Index>().prop_map(Change::End),
    ]
}

/// The records that are headers, by their checksums.
fn headers(tar: &[u8]) -> Vec<usize> {
    let is_header = |record: &[u8]| {
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(record);
        let sum = header.cksum();
        header.set_cksum();
        record.iter().any(|byte| *byte != 0)
            && sum.is_ok_and(|sum| header.cksum().is_ok_and(|right| right == sum))
    };
    let records = tar.chunks_exact(512).enumerate();
    records.filter(|(_, record)| is_header(record)).map(|(n, _)| n * 512).collect()
}

fn apply(tar: &mut Vec<u8>, change: &Change) {
    let headers = headers(tar);
    if headers.is_empty() || tar.len() < 1024 {
        return;
    }
    let one = |index: &Index| headers[index.index(headers.len())];
    match change {
        Change::Byte(at, byte) => {
            let at = at.index(tar.len());
            tar[at] = *byte;
        }
        Change::Field(header, field, digits) => {
            let (at, (begin, len)) = (one(header), FIELDS[*field]);
            let len = len.min(digits.len());
            tar[at + begin..at + begin + len].copy_from_slice(&digits[..len]);
            let mut header = Header::new_old();
            header.as_mut_bytes().copy_from_slice(&tar[at..at + 512]);
            header.set_cksum();
            tar[at..at + 512].copy_from_slice(header.as_bytes());
        }
        Change::Copy(from, to) => {
            let (from, to) = (one(from), to.index(tar.len() / 512) * 512);
            let record = tar[from..from + 512].to_vec();
            tar[to..to + 512].copy_from_slice(&record);
        }
        Change::Repeat(header) => {
            let at = one(header);
            let record = tar[at..at + 512].to_vec();
            tar.splice(at..at, record);
        }
        Change::Cut(header) => {
            let at = one(header);
            tar.drain(at..at + 512);
        }
        Change::End(at) => tar.truncate(at.index(tar.len())),
    }
}

#[test]
fn whatever_is_changed_it_is_the_same_snapshot_or_none() {
    let place = with_snapshot(SMALL);
    let tar = place.tar();
    assert!(headers(&tar).len() >= 6, "the headers are found");
    let original = place.store.open("one").unwrap().0;
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(changes in proptest::collection::vec(change(), 1..6))| {
        let mut changed = tar.clone();
        changes.iter().for_each(|change| apply(&mut changed, change));
        let import = Import { limit: 64 << 20, ..named(Some("two")) };
        match place.store.import(&changed[..], import, &mut untold) {
            Ok(imported) => {
                place.store.verify("two", &mut untold).unwrap();
                for file in &imported.manifest.files {
                    let same = original.files.iter().any(|one| one.path == file.path && one.sha256 == file.sha256);
                    // What a byte of the manifest changes is changed in what it is checked against, too.
                    prop_assert!(same || changes.iter().any(|change| matches!(change, Change::Byte(..))));
                }
                place.store.remove("two").unwrap();
            }
            Err(_) => prop_assert_eq!(files::entries(&place.path("")).unwrap(), [place.path("one")]),
        }
    });
}
