//! Interactive use.

use std::time::Duration;

use crate::{lab::Lab, needs::Backend, pty::Terminal};

/// Prompt, echo, window size and its change, Ctrl-C, Ctrl-D, exit status.
pub fn a_shell_on_a_terminal_feels_right(backend: Backend) {
    let lab = Lab::new(backend);
    let mut terminal = Terminal::start(&mut lab.run_command(&["--rm", "--tty"], "c", &["sh"]));
    use_shell(&lab, &mut terminal);
    // The shell's status is that of the command that Ctrl-C ended.
    let status = terminal.wait(lab.limit());
    assert_eq!(status.code(), Some(42));
    assert!(!lab.log_dir("c").join("stdout").exists(), "terminals are not logged");
    lab.nothing_is_left();
}

/// The same in a container that runs.
pub fn an_exec_on_a_terminal_feels_right(backend: Backend) {
    let lab = super::lab_with_waiting_container(backend);
    let mut terminal = Terminal::start(&mut lab.exec_command(&["--tty"], "c", &["sh"]));
    use_shell(&lab, &mut terminal);
    assert_eq!(terminal.wait(lab.limit()).code(), Some(42));
    lab.remove("c");
    lab.nothing_is_left();
}

fn use_shell(lab: &Lab, terminal: &mut Terminal) {
    let limit = lab.limit();
    terminal.wait_for("# ", limit);
    terminal.type_keys("tty; stty size; echo a$((1+1))b\r");
    terminal.wait_for("/dev/pts/", limit);
    terminal.wait_for("24 80", limit);
    terminal.wait_for("a2b", limit);
    terminal.type_keys("trap 'stty size' WINCH\r");
    wait_for_size(terminal, "41 133", limit);
    // Ctrl-C ends what runs in the foreground, not the shell. It is the program that says it has
    // started: what the shell says may come before the program is in the foreground.
    terminal.type_keys("sh -c \"echo st''arted; exec sleep 1000\"\r");
    terminal.wait_for("started", limit);
    terminal.type_keys("\x03");
    // The shell discards what is typed before its prompt.
    terminal.screen.wait_until("prompt after Ctrl-C", limit, |screen| {
        String::from_utf8_lossy(screen).split("started").last().is_some_and(|rest| rest.contains("# "))
    });
    terminal.type_keys("echo inter''rupted\r");
    terminal.wait_for("interrupted", Duration::from_secs(30));
    // Ctrl-D is the end of input, first that of a program, then that of the shell.
    terminal.type_keys("echo re''ading; cat; echo inp''ut ended; (exit 42)\r");
    terminal.wait_for("reading", limit);
    terminal.type_keys("typed\r");
    terminal.wait_for("typed\ntyped\n", limit);
    terminal.type_keys("\x04");
    terminal.wait_for("input ended", limit);
    // The shell takes it at its prompt only, of which nothing tells when it is ready for input.
    let ended = crate::command::poll(limit, || {
        terminal.type_keys("\x04");
        terminal.ends_within(Duration::from_millis(300))
    });
    assert!(ended, "Ctrl-D does not end the shell:\n{}", terminal.screen.text());
}

fn wait_for_size(terminal: &mut Terminal, size: &str, limit: Duration) {
    // ctr listens for SIGWINCH only after it has told the first size, so one that comes early is lost
    // to it: as when a window is dragged, there are several. And the size travels by another way than
    // what is typed.
    let arrived = crate::command::poll(limit, || {
        terminal.resize(132, 40);
        terminal.resize(133, 41);
        terminal.type_keys("stty size\r");
        std::thread::sleep(Duration::from_millis(200));
        terminal.screen.text().contains(size)
    });
    assert!(arrived, "the window is not {size}:\n{}", terminal.screen.text());
}

/// Nobody types, nobody resizes: the process on the terminal ends and so does ctr.
pub fn a_terminal_shows_the_last_byte_of_a_short_command(backend: Backend) {
    let lab = Lab::new(backend);
    let argv = ["sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 3"];
    let terminal = Terminal::start(&mut lab.run_command(&["--rm", "--tty"], "c", &argv));
    terminal.wait_for("line 1999\n", lab.limit());
    let text = terminal.screen.text();
    assert_eq!(terminal.wait(lab.limit()).code(), Some(3));
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("line ")).collect();
    assert_eq!(lines.len(), 2000);
    lab.nothing_is_left();
}
