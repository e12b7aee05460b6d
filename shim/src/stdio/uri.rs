//! Stdio URIs as containerd's runtime v2 documentation defines them.

use std::path::PathBuf;

/// Where a stream goes to or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// Nowhere.
    Null,
    /// A plain path or `fifo://`: usually a FIFO, but a file is taken, too.
    Path(PathBuf),
    /// `file://`: appended to, created with its parents.
    File(PathBuf),
    /// `binary://`: a program that reads the output from pipes.
    Program(Program),
}

/// A log program. containerd's own shim makes the arguments of the URI's query: each key, then its
/// first value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<String>,
}

/// What is wrong with a URI.
pub(super) type Reason = &'static str;

const ACCEPTED: Reason = "this scheme is not supported: use a path, fifo:///path, file:///path or binary:///program?argument=value";

/// Parses what containerd gives for stdout or stderr.
pub(super) fn parse_output(uri: &str) -> Result<Target, Reason> {
    if uri.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = split_scheme(uri) else {
        return Ok(Target::Path(absolute(uri.as_bytes().to_vec())?));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let query = parse_query(query)?;
    if query.iter().any(|(key, _)| key == "streaming_id") {
        return Err("containerd's streaming service is not supported: use FIFOs");
    }
    match scheme.to_ascii_lowercase().as_str() {
        "fifo" => Ok(Target::Path(absolute(decode(path, false)?)?)),
        "file" => Ok(Target::File(absolute(decode(path, false)?)?)),
        "binary" => {
            let path = absolute(decode(path, false)?)?;
            Ok(Target::Program(Program { path, arguments: arguments(query) }))
        }
        _ => Err(ACCEPTED),
    }
}

/// Parses what containerd gives for stdin: a path or nothing.
pub(super) fn parse_input(uri: &str) -> Result<Option<PathBuf>, Reason> {
    match parse_output(uri)? {
        Target::Null => Ok(None),
        Target::Path(path) => Ok(Some(path)),
        Target::File(_) | Target::Program(_) => Err("stdin can only be a path or fifo:///path"),
    }
}

/// The scheme of RFC 3986, section 3.1, if there is one; a path that contains "://" has none.
fn split_scheme(uri: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+.-".contains(&b));
    valid.then_some((scheme, rest))
}

fn absolute(path: Vec<u8>) -> Result<PathBuf, Reason> {
    use std::os::unix::ffi::OsStringExt;
    if path.contains(&0) {
        return Err("a path cannot contain a zero byte");
    }
    let path = PathBuf::from(std::ffi::OsString::from_vec(path));
    if path.is_absolute() { Ok(path) } else { Err("the path must be absolute") }
}

fn parse_query(query: &str) -> Result<Vec<(String, String)>, Reason> {
    let text = |part| {
        String::from_utf8(decode(part, true)?).map_err(|_| "the query must be UTF-8 when percent-decoded")
    };
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((text(key)?, text(value)?))
        })
        .collect()
}

/// Keys in the order of the URI, each with its first value. (containerd's order is random.)
fn arguments(query: Vec<(String, String)>) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    for (key, value) in query {
        if !arguments.iter().step_by(2).any(|known| *known == key) {
            arguments.extend([key, value]);
        }
    }
    arguments
}

/// Percent-decodes; `+` is a space in a query only.
fn decode(text: &str, query: bool) -> Result<Vec<u8>, Reason> {
    const REASON: Reason = "a % must be followed by two hexadecimal digits";
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or(REASON);
                (digit()? << 4 | digit()?) as u8
            }
            b'+' if query => b' ',
            other => other,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(uri: &str) -> Result<Target, Reason> {
        parse_output(uri)
    }

    #[test]
    fn plain_paths_are_taken_literally() {
        assert_eq!(path(""), Ok(Target::Null));
        for plain in ["/run/fifo", "/odd%20name?x=1", "/a://b"] {
            assert_eq!(path(plain), Ok(Target::Path(plain.into())));
        }
        assert_eq!(path("relative"), Err("the path must be absolute"));
    }

    #[test]
    fn each_documented_scheme_is_known() {
        assert_eq!(path("fifo:///run/a%20b"), Ok(Target::Path("/run/a b".into())));
        assert_eq!(path("file:///var/log/x.log"), Ok(Target::File("/var/log/x.log".into())));
        assert_eq!(
            path("binary:///usr/bin/logger?--tag=a+b&-v&--tag=ignored"),
            Ok(Target::Program(Program {
                path: "/usr/bin/logger".into(),
                arguments: ["--tag", "a b", "-v", ""].map(String::from).to_vec(),
            }))
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_with_a_reason() {
        for (uri, part) in [
            ("npipe:////x", "scheme"),
            ("ttrpc+unix:///run/s?streaming_id=1", "streaming"),
            ("fifo:///x?streaming_id=a", "streaming"),
            ("file://relative", "absolute"),
            ("binary:///a%zz", "hexadecimal"),
            ("file:///a%00", "zero byte"),
        ] {
            let reason = path(uri).unwrap_err();
            assert!(reason.contains(part), "{uri}: {reason}");
        }
    }

    #[test]
    fn stdin_can_only_be_a_path() {
        assert_eq!(parse_input(""), Ok(None));
        assert_eq!(parse_input("fifo:///x"), Ok(Some("/x".into())));
        assert!(parse_input("file:///x").is_err());
        assert!(parse_input("binary:///x").is_err());
    }
}
