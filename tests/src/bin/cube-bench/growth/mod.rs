//! How cost grows: with streams in one sandbox, and with sandboxes. Process backend.

mod sandboxes;
mod streams;

use crate::table::Table;

pub(crate) fn measure(table: &mut Table) {
    streams::measure(table);
    sandboxes::measure(table);
}
