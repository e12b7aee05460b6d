//! The environment that a Thaw gives to processes that are started later.

use cube_protocol::environment;
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

/// Gives `process` all of `environment`, in the place of what it has of the same names.
pub(super) fn overrule(process: &mut Process, environment: &[String]) {
    let own = process.env().clone().unwrap_or_default();
    process.set_env(Some(environment.to_vec()));
    complete(process, &own);
}

fn name(entry: &str) -> &str {
    environment::name(entry).unwrap_or(entry)
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
    fn what_is_inherited_does_not_win() {
        let mut process = Process::default();
        process.set_env(Some(vec!["A=1".into(), "B=2".into()]));
        overrule(&mut process, &["A=9".into(), "C=3".into()]);
        assert_eq!(process.env(), &Some(vec!["A=9".into(), "C=3".into(), "B=2".into()]));
    }
}
