//! One session, one epoch. INV-FILL rests on it that an attach that was decided in one epoch of a volume takes no later
//! one, by force neither; INV-LATE, that a session does not outlive a write that was given up.

mod group;

use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use group::{Switch, attach, attach_at, block, members};
use holdfast_protocol::volume::Refusal;
use holdfast_session::SessionError;
use holdfast_types::{BlockIndex, BlockRange};

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn an_attach_in_one_epoch_only() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let at = BlockRange::new(BlockIndex(3), 1);

        let first = attach(&members[0], false).await.expect("attaches");
        let before = first.epoch();
        first.detach(PATIENCE).await.expect("detaches");
        // A guest comes after the epoch was looked up, on this very node, and its session goes on.
        let guest = attach(&members[1], false).await.expect("attaches");
        guest.write(at, block(7, 1)).await.expect("writes");
        for (member, force) in [(0, false), (0, true), (1, false), (1, true)] {
            let late = attach_at(&members[member], force, Some(before)).await.map(|session| session.epoch());
            // Without force another node is told first who holds the volume.
            let held = member == 0 && !force;
            let refused = match &late {
                Err(SessionError::Refused(Refusal::EpochMismatch { .. })) => true,
                Err(SessionError::Refused(Refusal::HeldBy { .. })) => held,
                _ => false,
            };
            assert!(refused, "INV-FILL: member {member}, force {force}: {late:?}");
        }
        guest.write(at, block(8, 1)).await.expect("the guest was not disturbed");
        let now = guest.epoch();
        guest.detach(PATIENCE).await.expect("detaches");
        let in_time = attach_at(&members[0], false, Some(now)).await.expect("the epoch is still the same");
        assert_eq!(in_time.read(at).await.expect("reads"), block(8, 1));
    });
}

/// INV-LATE: it may be on its way still, and land after whatever this session would write next.
#[test]
fn a_write_that_is_given_up_ends_its_session() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let at = BlockRange::new(BlockIndex(3), 1);
        let session = attach(&members[0], false).await.expect("attaches");
        session.write(at, block(6, 1)).await.expect("writes");
        let under_way = session.write(at, block(7, 1)).now_or_never();
        assert!(under_way.is_none(), "no write ends at once");
        let after = session.write(at, block(8, 1)).await;
        assert!(matches!(after, Err(SessionError::Closed(_))), "{after:?}");
        let again = attach(&members[0], false).await.expect("attaches in a new epoch");
        again.write(at, block(9, 1)).await.expect("writes");
        assert_eq!(again.read(at).await.expect("reads"), block(9, 1));
    });
}
