//! The environment that a Thaw gives to processes that are started later.

use oci_spec::runtime::Process;

/// Gives `process` each "NAME=value" of `defaults` whose name it does not set itself.
pub(super) fn complete(process: &mut Process, defaults: &[String]) {
    if defaults.is_empty() {
        return;
    }
    let mut environment = process.env().clone().unwrap_or_default();
    let missing: Vec<_> = defaults
        .iter()
        .filter(|default| environment.iter().all(|own| name(own) != name(default)))
        .cloned()
        .collect();
    environment.extend(missing);
    process.set_env(Some(environment));
}

/// Whether `entry` is "NAME=value" as environ(7) has it.
pub fn is_entry(entry: &str) -> bool {
    entry.contains('=') && !name(entry).is_empty() && !entry.contains('\0')
}

fn name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_sets_itself_wins() {
        let mut process = Process::default();
        process.set_env(Some(vec!["A=1".into(), "LONG=2".into()]));
        let defaults = ["A=9", "LON=3", "EMPTY=", "B=x=y"].map(String::from);
        complete(&mut process, &defaults);
        let expected = ["A=1", "LONG=2", "LON=3", "EMPTY=", "B=x=y"].map(String::from).to_vec();
        assert_eq!(process.env(), &Some(expected));
    }

    #[test]
    fn an_entry_has_a_name() {
        assert!(is_entry("A=") && is_entry("A=b=c"));
        assert!(!is_entry("A") && !is_entry("=b") && !is_entry("") && !is_entry("A=b\0c"));
    }
}
