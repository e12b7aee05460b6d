//! Text in columns.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
};

use crate::error::CliError;

/// Writes `rows` with columns as wide as their widest cell, the last one excepted.
pub(crate) fn write<const N: usize>(output: File, rows: &[[String; N]]) -> Result<(), CliError> {
    let mut output = BufWriter::new(output);
    write_to(&mut output, rows).and_then(|()| output.flush()).map_err(CliError::Output)
}

/// As [`write`], as a part of something longer.
pub(crate) fn write_to<const N: usize>(output: &mut impl Write, rows: &[[String; N]]) -> io::Result<()> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(output, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
