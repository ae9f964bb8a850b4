//! INV-FILL rests on it: an attach that was decided in one epoch of a volume takes no later one, by force neither.

mod group;

use std::rc::Rc;
use std::time::Duration;

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
