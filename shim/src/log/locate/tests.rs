use std::{fs, os::unix::fs::symlink};

use super::*;

struct Roots {
    temp: tempfile::TempDir,
}

impl Roots {
    fn new(logs: &[&str]) -> Roots {
        let temp = tempfile::tempdir().unwrap();
        for log in logs {
            fs::create_dir_all(temp.path().join(log)).unwrap();
            fs::write(temp.path().join(log).join("stdout"), "x").unwrap();
        }
        Roots { temp }
    }

    fn find(&self, namespace: Option<&str>, id: &str) -> Result<String, LocateError> {
        find(&[self.temp.path().into()], namespace, id).map(|log| log.name.to_string())
    }
}

#[test]
fn a_unique_prefix_is_enough() {
    let roots = Roots::new(&["default/web-1", "default/db-1"]);
    assert_eq!(roots.find(None, "w").unwrap(), "default/web-1");
    assert_eq!(roots.find(None, "db-1").unwrap(), "default/db-1");
}

#[test]
fn an_ambiguous_prefix_lists_the_candidates() {
    let roots = Roots::new(&["default/web-1", "k8s.io/web-2", "default/db"]);
    let error = roots.find(None, "web").unwrap_err();
    assert!(matches!(error, LocateError::Ambiguous { .. }));
    let text = error.to_string();
    assert!(
        text.contains("default/web-1") && text.contains("k8s.io/web-2") && !text.contains("db"),
        "{text}"
    );
    assert_eq!(roots.find(Some("k8s.io"), "web").unwrap(), "k8s.io/web-2");
}

#[test]
fn a_full_id_wins_over_longer_ones_and_is_ambiguous_across_namespaces() {
    let roots = Roots::new(&["default/web", "default/web-1", "other/web"]);
    assert_eq!(roots.find(Some("default"), "web").unwrap(), "default/web");
    assert!(matches!(roots.find(None, "web"), Err(LocateError::Ambiguous { .. })));
}

#[test]
fn an_older_log_of_the_same_id_is_found_by_its_full_name_only() {
    let roots = Roots::new(&["default/web", "default/web.1732250000", "default/db.1732250000"]);
    assert_eq!(roots.find(None, "we").unwrap(), "default/web");
    assert_eq!(roots.find(None, "web.1732250000").unwrap(), "default/web.1732250000");
    let error = roots.find(None, "db").unwrap_err();
    assert!(matches!(error, LocateError::NotFound { .. }));
    assert!(error.to_string().contains("db.1732250000"), "{error}");
}

#[test]
fn what_is_not_there_is_not_found_and_the_error_says_where_it_was_sought() {
    let roots = Roots::new(&[]);
    let text = roots.find(None, "web").unwrap_err().to_string();
    assert!(text.contains(roots.temp.path().to_str().unwrap()), "{text}");
    let missing = find(&["/nonexistent/logs".into()], None, "web").unwrap_err();
    assert!(matches!(missing, LocateError::NotFound { .. }), "{missing}");
}

#[test]
fn an_id_that_is_a_path_is_refused() {
    let roots = Roots::new(&["default/web"]);
    for id in ["../web", "..", ".", "", "default/web", "/etc", "we\0b", "-w", "wéb"] {
        assert!(matches!(roots.find(None, id), Err(LocateError::Invalid { .. })), "{id:?}");
        if !id.is_empty() {
            assert!(matches!(roots.find(Some(id), "web"), Err(LocateError::Invalid { .. })), "{id:?}");
        }
    }
}

#[test]
fn a_link_in_place_of_the_directory_is_an_error_and_not_followed() {
    let roots = Roots::new(&["default/web"]);
    symlink(roots.temp.path().join("default/web"), roots.temp.path().join("default/mine")).unwrap();
    let error = roots.find(None, "mine").unwrap_err();
    assert!(matches!(error, LocateError::Read(ReadError::Link { .. })), "{error}");
}

#[test]
fn a_bundle_without_a_log_is_no_candidate() {
    let roots = Roots::new(&["default/web-1"]);
    fs::create_dir(roots.temp.path().join("default/web-runc")).unwrap();
    fs::write(roots.temp.path().join("default/web-runc/config.json"), "{}").unwrap();
    assert_eq!(roots.find(None, "web").unwrap(), "default/web-1");
}

#[test]
fn the_root_of_a_log_directory_is_known_by_its_layout() {
    let name = Name { namespace: "default".into(), id: "web".into() };
    assert_eq!(root_of(Path::new("/var/log/cube/default/web"), &name), Some("/var/log/cube".into()));
    assert_eq!(root_of(Path::new("/somewhere/else"), &name), None);
}
