//! Texts of others, on their way to somebody's terminal.

use std::borrow::Cow;

/// `text` without anything that a terminal obeys, or that makes it look like another one: control characters and
/// those that change direction, join, or do not show are escaped as in a Rust string. What prints stays as it is,
/// in any script.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(prints) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match prints(c) {
            true => escaped.push(c),
            false => escaped.extend(c.escape_default()),
        }
    }
    Cow::Owned(escaped)
}

/// As [`printable`], of a text in lines.
pub fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// JSON that is as printable. JSON itself escapes no more than the controls of ASCII.
pub fn printable_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        match c == '\n' || prints(c) {
            true => escaped.push(c),
            // No character of JSON's own is one of these: it is inside of a string.
            false => {
                let mut units = [0; 2];
                c.encode_utf16(&mut units)
                    .iter()
                    .for_each(|unit| escaped.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
    escaped
}

fn prints(c: char) -> bool {
    let hidden = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    !c.is_control() && !hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clears the screen, sets the title, hides what follows, rings, goes back, turns the line around.
    const HOSTILE: &str = "a\x1b[2J\x1b]0;owned\x07\u{9b}31mb\r\nc\u{202e}d\u{200b}\x7f";

    #[test]
    fn nothing_that_a_terminal_obeys_is_left_and_what_prints_stays() {
        let shown = printable(HOSTILE);
        assert_eq!(shown, "a\\u{1b}[2J\\u{1b}]0;owned\\u{7}\\u{9b}31mb\\r\\nc\\u{202e}d\\u{200b}\\u{7f}");
        for text in ["", "web-1", "ärger 日本 🦀 \\u{1b}"] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(printable_lines("a\n\tb\x1b"), "a\n\\tb\\u{1b}");
    }

    #[test]
    fn json_stays_what_it_says() {
        let value = serde_json::json!({HOSTILE: [HOSTILE, "ärger", "\u{e0041}"]});
        let text = printable_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || prints(c)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
