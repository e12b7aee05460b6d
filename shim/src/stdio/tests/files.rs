//! `file://`, plain files and `binary://`.

use super::*;

fn ended(stdout: &[u8], stderr: &[u8]) -> Arc<FakeAgent> {
    let agent = FakeAgent::new(3000);
    agent.write(Stream::STDOUT, stdout);
    agent.write(Stream::STDERR, stderr);
    agent.end(Stream::STDOUT, Flags::NONE);
    agent.end(Stream::STDERR, Flags::NONE);
    agent
}

#[tokio::test]
async fn both_streams_append_to_one_file_that_is_created_with_its_parents() {
    use std::os::unix::fs::MetadataExt;
    for log in [false, true] {
        let place = Place::new();
        let path = place.path("new/dir/out.log");
        let uri = format!("file://{}", path.display());
        let base = if log { place.logged() } else { place.config() };
        for round in 1..=2 {
            let agent = ended(&[b'o'; 50_000], &[b'e'; 50_000]);
            let config = StdioConfig { stdout: uri.clone(), stderr: uri.clone(), ..base.clone() };
            let io = started(config, &agent).await;
            assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
            let bytes = std::fs::read(&path).unwrap();
            let count = |byte| bytes.iter().filter(|b| **b == byte).count();
            assert_eq!(
                (count(b'o'), count(b'e'), bytes.len()),
                (50_000 * round, 50_000 * round, 100_000 * round)
            );
        }
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }
}

#[tokio::test]
async fn a_plain_path_may_be_a_file_and_is_appended_to() {
    let place = Place::new();
    let path = place.path("out");
    std::fs::write(&path, "before ").unwrap();
    let agent = ended(b"after", b"");
    let config = StdioConfig { stdout: path.to_str().unwrap().into(), ..place.config() };
    let io = started(config, &agent).await;
    assert!(soon(io.finish(LIMIT)).await.complete);
    assert_eq!(std::fs::read(&path).unwrap(), b"before after");
}

#[tokio::test]
async fn a_path_that_does_not_exist_or_a_scheme_that_is_not_known_is_refused_by_name() {
    let place = Place::new();
    for (uri, part) in [
        ("/nonexistent/out", "/nonexistent/out"),
        ("npipe:////x", "npipe"),
        ("ttrpc+unix:///run/x?streaming_id=1", "streaming"),
        ("binary:///nonexistent/logger", "/nonexistent/logger"),
    ] {
        let config = StdioConfig { stdout: uri.into(), ..place.config() };
        let error = ProcessIo::prepare(config).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// The URI of a log program.
fn script(place: &Place, text: &str) -> String {
    let (source, path) = (place.path("source"), place.path("logger"));
    std::fs::write(&source, format!("#!/bin/sh\n{text}")).unwrap();
    // A file that is open for writing cannot be executed (ETXTBSY), and a process that another test
    // forks right now inherits what this one has open. So another process writes it.
    let copied = std::process::Command::new("install").arg("-m755").args([&source, &path]).status();
    assert!(copied.unwrap().success());
    format!("binary://{}", path.display())
}

#[tokio::test]
async fn a_log_program_gets_both_streams_its_arguments_and_its_environment() {
    for log in [false, true] {
        let place = Place::new();
        let root = place.root.path().display().to_string();
        let uri = script(
            &place,
            &format!(
                "exec 5>&-\n\
                 echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\" > {root}/told\n\
                 cat <&4 > {root}/err &\n\
                 cat <&3 > {root}/out\n\
                 wait\n"
            ),
        );
        let agent = ended(&pattern(0, 300_000), &pattern(9, 200_000));
        let uri = format!("{uri}?--tag=a+b&-v");
        let base = if log { place.logged() } else { place.config() };
        let config = StdioConfig { stdout: uri.clone(), stderr: uri, ..base };
        let io = started(config, &agent).await;
        assert_eq!(soon(io.finish(LIMIT)).await, FinishReport { complete: true, discarded_bytes: 0 });
        assert_same(&std::fs::read(place.path("out")).unwrap(), &pattern(0, 300_000));
        assert_same(&std::fs::read(place.path("err")).unwrap(), &pattern(9, 200_000));
        assert_eq!(std::fs::read_to_string(place.path("told")).unwrap(), "ns/id --tag a b -v \n");
    }
}

#[tokio::test]
async fn a_log_program_that_goes_away_does_not_stop_the_process() {
    let place = Place::new();
    let uri = script(&place, "exit 0\n");
    let agent = ended(&pattern(0, 1_000_000), b"");
    let io = started(StdioConfig { stdout: uri, ..place.config() }, &agent).await;
    soon(agent.until(|a| a.is_released(Stream::STDOUT))).await;
    let report = soon(io.finish(LIMIT)).await;
    assert!(!report.complete && report.discarded_bytes > 900_000, "{report:?}");
}

#[tokio::test]
async fn a_log_program_that_will_not_end_is_terminated_and_then_killed() {
    for trap in ["", "trap '' TERM\n"] {
        let place = Place::new();
        let pid = place.path("pid");
        let text = format!("{trap}echo $$ > {}\nexec 5>&-\nwhile :; do sleep 0.05; done\n", pid.display());
        let uri = script(&place, &text);
        let agent = ended(b"x", b"");
        let io = started(StdioConfig { stdout: uri, ..place.config() }, &agent).await;
        let begun = Instant::now();
        soon(io.finish(Duration::from_millis(800))).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        let pid: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}

#[tokio::test]
async fn two_different_log_programs_are_refused() {
    let place = Place::new();
    let config =
        StdioConfig { stdout: "binary:///bin/a".into(), stderr: "binary:///bin/b".into(), ..place.config() };
    assert!(matches!(ProcessIo::prepare(config).await, Err(StdioError::Uri { name: "stderr", .. })));
}
