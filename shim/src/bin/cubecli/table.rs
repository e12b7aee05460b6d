//! Text in columns.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
};

use cube_shim::text::printable;

use crate::error::CliError;

/// Writes `rows`, whose texts may be those of others, with columns as wide as their widest cell, the last one excepted.
pub(crate) fn write<const N: usize>(output: File, rows: &[[String; N]]) -> Result<(), CliError> {
    let mut output = BufWriter::new(output);
    write_to(&mut output, rows).and_then(|()| output.flush()).map_err(CliError::Output)
}

/// As [`write`], as a part of something longer.
pub(crate) fn write_to<const N: usize>(output: &mut impl Write, rows: &[[String; N]]) -> io::Result<()> {
    let rows: Vec<[_; N]> = rows.iter().map(|row| row.each_ref().map(|cell| printable(cell))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(output, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_columns_stay_columns() {
        let mut output = Vec::new();
        let rows = [["NAME", "OF"], ["\x1b[2Jx\n", "a\u{9b}"], ["é", "b"]].map(|row| row.map(String::from));
        write_to(&mut output, &rows).unwrap();
        let text = String::from_utf8(output).unwrap();
        let of = |line: &str| {
            line.chars().position(|c| c == ' ').map(|at| line.chars().skip(at).collect::<String>())
        };
        assert!(text.lines().all(|line| line.chars().all(|c| !c.is_control())), "{text:?}");
        assert_eq!(text.lines().count(), 3, "{text:?}");
        assert!(text.lines().all(|line| of(line).is_some()), "{text:?}");
        assert!(text.contains("\\u{1b}[2Jx\\n  a\\u{9b}\n"), "{text:?}");
    }
}
