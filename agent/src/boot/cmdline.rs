//! Options on the kernel command line: the words that begin with `cube.`.

use tracing::level_filters::LevelFilter;

const PREFIX: &str = "cube.";

/// What the kernel command line asks of the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// `cube.log=off|error|warn|info|debug|trace`; default info.
    pub log: LevelFilter,
    /// Words that begin with `cube.` and mean nothing to this version, to be logged.
    pub ignored: Vec<String>,
}

impl Options {
    /// Reads the text of /proc/cmdline. The last of several equal options counts, as in the kernel.
    pub fn parse(cmdline: &str) -> Options {
        let mut options = Options { log: LevelFilter::INFO, ignored: Vec::new() };
        for word in cmdline.split_ascii_whitespace() {
            let Some(option) = word.strip_prefix(PREFIX) else { continue };
            match option.split_once('=') {
                Some(("log", level)) if level.parse::<LevelFilter>().is_ok() => {
                    options.log = level.parse().unwrap_or(options.log);
                }
                _ => options.ignored.push(word.to_owned()),
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_others_are_left_alone() {
        let options = Options::parse("console=ttyS0 quiet panic=-1 mycube.log=trace\n");
        assert_eq!(options, Options { log: LevelFilter::INFO, ignored: vec![] });
    }

    #[test]
    fn the_last_log_level_counts() {
        assert_eq!(Options::parse("cube.log=debug cube.log=warn").log, LevelFilter::WARN);
    }

    #[test]
    fn unknown_options_and_levels_are_named() {
        let options = Options::parse("cube.log=loud cube.colour=red cube.log cube.");
        assert_eq!(options.log, LevelFilter::INFO);
        assert_eq!(options.ignored, ["cube.log=loud", "cube.colour=red", "cube.log", "cube."]);
    }
}
