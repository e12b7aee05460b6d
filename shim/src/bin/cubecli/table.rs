//! Text in columns.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
};

use crate::error::CliError;

/// Writes `rows` with columns as wide as their widest cell, the last one excepted.
pub(crate) fn write<const N: usize>(output: File, rows: &[[String; N]]) -> Result<(), CliError> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut output = BufWriter::new(output);
    let mut write = || -> io::Result<()> {
        for row in rows {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(output, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        output.flush()
    };
    write().map_err(CliError::Output)
}
