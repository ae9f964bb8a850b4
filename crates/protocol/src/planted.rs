//! Faults that tests plant by name to prove that they would be found. Compiled out of every release: without the
//! feature `planted-bugs` (and outside this crate's own tests) [`is_planted`] is the constant `false`.

/// Every fault that can be planted, and the invariant that it breaks.
pub const KNOWN: &[(&str, &str)] = &[
    ("damaged-in-flight", "INV-CHECKED"),
    ("skip-epoch-check", "INV-FENCE"),
    ("attach-without-compare", "INV-FENCE"),
    ("retry-applied-twice", "INV-ONCE"),
    ("late-write-applied", "INV-LATE"),
    ("unsettled-ignored", "INV-SETTLE"),
    ("snapshot-made-twice", "INV-SNAPSHOT"),
    ("restore-without-compare", "INV-RESTORE"),
    ("restore-while-held", "INV-RESTORE"),
    ("drift-ignored", "INV-LEASE"),
    ("append-clock", "INV-LEASE"),
    ("timers-unequal", "INV-TIMERS"),
    ("lead-on-a-hung-disk", "INV-GRAY"),
    ("give-to-who-cannot-write", "INV-GRAY"),
    ("leader-restore", "INV-TERM"),
    ("run-rolled-back", "INV-ROLLBACK"),
    ("fill-up", "INV-SPACE"),
    ("keep-the-log-for-the-absent", "INV-ADMIT"),
    ("purge-what-others-lack", "INV-ADMIT"),
    ("witness-purges-early", "INV-WITNESS"),
    ("witness-sends-a-snapshot", "INV-WITNESS"),
    ("witness-campaigns-without-the-log", "INV-WITNESS"),
    ("hoard-the-reserve", "INV-SPACE"),
    ("data-after-detach", "INV-FENCE"),
    ("window-forgotten", "INV-ONCE"),
    ("lease-too-long", "INV-LEASE"),
    ("lease-from-answer", "INV-LEASE"),
    ("lease-unasked-after-read", "INV-LEASE"),
    ("renewal-in-transfer", "INV-LEASE"),
    ("silence-skipped", "INV-LEASE"),
    ("settled-at-once", "INV-SETTLE"),
    ("fence-not-obeyed", "INV-SETTLE"),
    ("read-below-floor", "INV-STAGE"),
    ("floor-of-writes-forgotten", "INV-STAGE"),
    ("serve-floor-ignored", "INV-STAGE"),
    ("rebuilt-serves-at-once", "INV-STAGE"),
    ("rebuild-from-anybody", "INV-STAGE"),
    ("rebuild-is-outrun", "progress"),
    ("numbers-from-one", "INV-ONCE"),
    ("append-acknowledged-early", "INV-ACK"),
    ("purge-too-far", "INV-TERM"),
    ("joint-not-understood", "INV-MEMBER"),
    ("transfer-without-drain", "INV-MEMBER"),
    ("late-destroy-obeyed", "INV-MEMBER"),
    ("recover-without-incarnation", "INV-RECOVER"),
    ("superseded-not-told", "INV-RECOVER"),
    ("recover-from-the-shorter", "INV-RECOVER"),
    ("recover-while-answered", "INV-RECOVER"),
    ("sealed-is-kept", "INV-RECOVER"),
    ("snapshot-quota-ignored", "INV-QUOTA"),
    ("two-on-a-node", "INV-PLACE"),
    ("store-ends-the-daemon", "INV-STORES"),
    ("foreign-store-ends-the-daemon", "INV-STORES"),
    ("sign-what-is-held", "INV-CERT"),
    ("minority-certifies", "INV-CERT"),
    ("signatures-unread", "INV-CERT"),
    ("rest-unasked", "INV-REST"),
    ("rest-while-behind", "INV-REST"),
    ("rest-unwatched", "INV-REST"),
    ("woken-leader-unasked", "INV-REST"),
];

/// Those that break a rule of the state machine outside of it: its own model cannot find them, the simulation does.
pub const OUTSIDE: [&str; 3] = ["settled-at-once", "fence-not-obeyed", "numbers-from-one"];

#[cfg(any(test, feature = "planted-bugs"))]
thread_local! {
    static PLANTED: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Plants faults by name on this thread, instead of those before; none with an empty list.
///
/// # Panics
/// On a name that is not in [`KNOWN`]: a test that plants nothing would prove nothing.
#[cfg(any(test, feature = "planted-bugs"))]
pub fn plant(names: &[&str]) {
    for name in names {
        assert!(
            KNOWN.iter().any(|(known, _)| known == name),
            "no fault is named '{name}'; known are {KNOWN:?}"
        );
    }
    PLANTED.with(|planted| *planted.borrow_mut() = names.iter().map(|name| (*name).to_owned()).collect());
}

/// Whether a fault is planted on this thread.
#[cfg(any(test, feature = "planted-bugs"))]
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}

/// Whether a fault is planted: never, in a release.
#[cfg(not(any(test, feature = "planted-bugs")))]
pub const fn is_planted(_name: &str) -> bool {
    false
}
